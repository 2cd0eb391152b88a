// Golden rows through one build of onnxruntime for JavaScript, in Node.js or in a page.

import { readInputs } from "./npz.mjs";

/**
 * The model's outputs for all golden rows: one batch of the first row, one of the others.
 *
 * Returns [{name: {type, shape, data}}] per batch, where data is base64 of little-endian numbers,
 * or an array of strings.
 */
export async function answer(ort, model, golden, options) {
  const session = await ort.InferenceSession.create(model, options);
  const inputs = readInputs(golden);
  const [rows] = Object.values(inputs)[0].shape;
  const batches = [];
  for (const [from, to] of [[0, 1], [1, rows]]) {
    const feeds = {};
    for (const [name, { type, shape, data }] of Object.entries(inputs)) {
      const stride = data.length / shape[0];
      const part = data.slice(from * stride, to * stride);
      feeds[name] = new ort.Tensor(type, part, [to - from, ...shape.slice(1)]);
    }
    const outputs = Object.entries(await session.run(feeds));
    batches.push(Object.fromEntries(outputs.map(([name, tensor]) => [name, encode(tensor)])));
  }
  await session.release();
  return batches;
}

function encode({ type, dims, data }) {
  return { type, shape: [...dims], data: type === "string" ? [...data] : base64(data) };
}

function base64({ buffer, byteOffset, byteLength }) {
  const bytes = new Uint8Array(buffer, byteOffset, byteLength);
  let text = "";
  for (let at = 0; at < bytes.length; at += 0x8000) {
    text += String.fromCharCode(...bytes.subarray(at, at + 0x8000));
  }
  return btoa(text);
}
