// Reads golden rows: an uncompressed zip of NumPy arrays, as components/export/golden.py writes it.
//
// Sources of the formats: https://pkware.cachefly.net/webdocs/casestudies/APPNOTE.TXT and
// https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html

const TYPES = {
  "<f4": ["float32", Float32Array],
  "<f8": ["float64", Float64Array],
  "<i4": ["int32", Int32Array],
  "<i8": ["int64", BigInt64Array],
  "|b1": ["bool", Uint8Array],
};

/** The inputs of a golden file: {name: {type, shape, data}}, of N rows each. */
export function readInputs(bytes) {
  const inputs = {};
  for (const [entry, content] of unzip(bytes)) {
    const key = entry.replace(/\.npy$/, "");
    if (key.startsWith("input/")) inputs[key.slice("input/".length)] = readArray(content, entry);
  }
  return inputs;
}

/** Name and bytes of every entry of a zip archive without compression. */
export function* unzip(bytes) {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const end = findEnd(view);
  let at = view.getUint32(end + 16, true);
  for (let left = view.getUint16(end + 10, true); left > 0; left--) {
    expect(view.getUint32(at, true) === 0x02014b50, "a zip directory must list every entry");
    const [nameLength, extra, comment] = [28, 30, 32].map((i) => view.getUint16(at + i, true));
    const name = new TextDecoder().decode(bytes.subarray(at + 46, at + 46 + nameLength));
    const size = view.getUint32(at + 24, true);
    const local = view.getUint32(at + 42, true);
    expect(view.getUint16(at + 10, true) === 0, `${name} must be stored, not compressed`);
    expect(size < 0xffffffff && local < 0xffffffff, `${name} must be smaller than 4 GB`);
    const start = local + 30 + view.getUint16(local + 26, true) + view.getUint16(local + 28, true);
    yield [name, bytes.slice(start, start + size)]; // a copy is aligned for every element type
    at += 46 + nameLength + extra + comment;
  }
}

/** Where the record at the end of the archive begins; a comment may follow it. */
function findEnd(view) {
  for (let at = view.byteLength - 22; at >= 0; at--) {
    if (view.getUint32(at, true) === 0x06054b50) return at;
  }
  throw new Error("golden rows must be a zip archive; its end is missing");
}

/** One .npy file as {type, shape, data}; data is a typed array, or an array of strings. */
function readArray(bytes, name) {
  const view = new DataView(bytes.buffer);
  expect(view.getUint32(0) === 0x934e554d, `${name} must be a NumPy array`);
  expect(bytes[6] === 1, `${name} must be of version 1 of the format; got ${bytes[6]}`);
  const body = 10 + view.getUint16(8, true);
  const header = new TextDecoder("latin1").decode(bytes.subarray(10, body));
  const [, descr] = header.match(/'descr': '([^']+)'/) ?? [];
  const [, axes] = header.match(/'shape': \(([^)]*)\)/) ?? [];
  expect(descr && axes !== undefined, `${name} must say its type and shape; got ${header}`);
  expect(header.includes("'fortran_order': False"), `${name} must lie in C order`);
  const shape = axes.split(",").filter((axis) => axis.trim()).map(Number);
  const count = shape.reduce((product, axis) => product * axis, 1);
  if (descr.startsWith("<U")) {
    return { type: "string", shape, data: readStrings(view, body, count, Number(descr.slice(2))) };
  }
  expect(descr in TYPES, `${name} must be of ${Object.keys(TYPES)} or <U; got ${descr}`);
  const [type, TypedArray] = TYPES[descr];
  return { type, shape, data: new TypedArray(bytes.slice(body).buffer, 0, count) };
}

/** NumPy's unicode: `width` code points of four bytes each, filled up with zeros. */
function readStrings(view, body, count, width) {
  return Array.from({ length: count }, (_, i) => {
    const start = body + i * width * 4;
    const points = Array.from({ length: width }, (_, j) => view.getUint32(start + j * 4, true));
    while (points.at(-1) === 0) points.pop();
    return points.map((point) => String.fromCodePoint(point)).join("");
  });
}

function expect(holds, rule) {
  if (!holds) throw new Error(rule);
}
