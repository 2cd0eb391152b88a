// What the page of engine "chromium" runs; everything comes from the address that served it.

import * as ort from "./ort/ort.wasm.bundle.min.mjs";

import { answer } from "./answer.mjs";

export async function run() {
  ort.env.wasm.numThreads = 1; // more would need a page that is isolated from other origins
  ort.env.wasm.wasmPaths = new URL("./ort/", import.meta.url).href;
  ort.env.logLevel = "error";
  const options = { executionProviders: ["wasm"] };
  const batches = await answer(ort, await bytes("model.onnx"), await bytes("golden.npz"), options);
  return JSON.stringify({ version: `onnxruntime-web ${ort.env.versions.web}`, batches });
}

async function bytes(name) {
  const response = await fetch(name);
  if (!response.ok) throw new Error(`${name}: ${response.status}`);
  return new Uint8Array(await response.arrayBuffer());
}
