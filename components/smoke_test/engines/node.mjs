// The child of engine "node": node node.mjs NODE_MODULES MODEL GOLDEN ANSWER
//
// Writes {version, batches}, or {broken} where onnxruntime-node cannot load, or {failure}.

import { readFileSync, writeFileSync } from "node:fs";
import { createRequire } from "node:module";
import { join } from "node:path";

import { answer } from "./answer.mjs";

const [, , modules, model, golden, path] = process.argv;
writeFileSync(path, JSON.stringify(await run()));

async function run() {
  let ort;
  let version;
  try {
    const require = createRequire(join(modules, "any"));
    ort = require(join(modules, "onnxruntime-node"));
    const { version: own } = require(join(modules, "onnxruntime-node", "package.json"));
    version = `onnxruntime-node ${own}, Node.js ${process.versions.node}`;
  } catch (error) {
    return { broken: String(error) };
  }
  try {
    const options = { intraOpNumThreads: 1, interOpNumThreads: 1, logSeverityLevel: 3 };
    const batches = await answer(ort, bytes(model), bytes(golden), options);
    return { version, batches };
  } catch (error) {
    return { failure: String(error) };
  }
}

function bytes(file) {
  return new Uint8Array(readFileSync(file));
}
