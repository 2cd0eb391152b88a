// The page's form, and the registered model behind it.

import * as ort from "./ort/ort.wasm.bundle.min.mjs";

const byId = (id) => document.getElementById(id);
const MISSING_TEXT = "";

/** A session of the model, and the schema that came with it. */
export async function load() {
  ort.env.wasm.numThreads = 1; // more would need headers that a plain file server does not send
  ort.env.wasm.wasmPaths = new URL("./ort/", import.meta.url).href;
  const [schema, session] = await Promise.all([
    fetch("schema.json").then((response) => response.json()),
    ort.InferenceSession.create("model.onnx", { executionProviders: ["wasm"] }),
  ]);
  return { schema, session };
}

/**
 * Label and probability of each class for one row.
 *
 * A column of the row that is null is missing: NaN for a number, empty for a text.
 */
export async function predict({ schema, session }, row) {
  const feeds = {};
  for (const [name, { dtype }] of Object.entries(schema.columns)) {
    feeds[name] = tensor(dtype, row[name]);
  }
  const outputs = await session.run(feeds);
  const [numbers] = schema.outputs.map((name) => [...outputs[name].data]);
  const shares = numbers.length === 1 ? [1 - numbers[0], numbers[0]] : numbers;
  return { label: outputs.label.data[0], shares };
}

function tensor(dtype, value) {
  switch (dtype) {
    case "string": return new ort.Tensor("string", [value ?? MISSING_TEXT], [1]);
    case "bool": return new ort.Tensor("bool", Uint8Array.of(value ? 1 : 0), [1]);
    case "int64": return new ort.Tensor("int64", BigInt64Array.of(BigInt(value)), [1]);
    case "float64": return new ort.Tensor("float64", Float64Array.of(value ?? NaN), [1]);
    default: throw new Error(`columns of ${dtype} are not known here`);
  }
}

function element(kind, properties = {}, ...children) {
  const made = Object.assign(document.createElement(kind), properties);
  made.append(...children);
  return made;
}

function field(name, column) {
  const id = `column-${name}`;
  const unit = column.unit ? element("span", { className: "unit" }, ` (${column.unit})`) : "";
  const label = element("label", { htmlFor: id }, column.title, unit);
  const control = column.kind === "choice" ? choice(column) : input(column);
  Object.assign(control, { id, name });
  const made = element("div", { className: "field" }, label, control);
  if (column.kind === "flag") made.className = "field flag";
  return made;
}

function choice(column) {
  const missing = element("option", { value: MISSING_TEXT }, "unknown");
  const known = column.values.map((value) => element("option", { value }, value));
  return element("select", {}, missing, ...known);
}

function input(column) {
  if (column.kind === "flag") return element("input", { type: "checkbox" });
  const whole = column.dtype === "int64";
  if (column.kind === "time") return element("input", { type: "time", required: whole });
  const made = element("input", { type: "number", step: whole ? "1" : "any", required: whole });
  made.placeholder = whole ? "" : "missing";
  made.title = `usually ${format(column.low)} to ${format(column.high)}`;
  return made;
}

function format(value) {
  return String(Number(value.toPrecision(4)));
}

function show(schema, row) {
  for (const [name, column] of Object.entries(schema.columns)) {
    const control = byId(`column-${name}`);
    const value = row[name];
    if (column.kind === "flag") control.checked = Boolean(value);
    else if (value === null || value === undefined) control.value = "";
    else if (column.kind === "time") control.value = clock(value);
    else control.value = column.kind === "number" ? shortest(value) : value;
    if (control.value === "" && column.kind === "choice") control.value = MISSING_TEXT;
  }
}

/** The shortest spelling of a number that is the same in float32, which is what the graph sees. */
function shortest(value) {
  const digits = [6, 7, 8, 9].find((n) => Math.fround(value.toPrecision(n)) === Math.fround(value));
  return String(digits ? Number(value.toPrecision(digits)) : value);
}

function read(schema) {
  const row = {};
  for (const [name, column] of Object.entries(schema.columns)) {
    const control = byId(`column-${name}`);
    if (column.kind === "flag") row[name] = control.checked;
    else if (column.kind === "choice") row[name] = category(control.value, column.dtype);
    else if (control.value === "") row[name] = null;
    else row[name] = column.kind === "time" ? minutes(control.value) : Number(control.value);
  }
  return row;
}

/** A category as its column holds it; vocabularies are text whatever the column. */
function category(text, dtype) {
  if (dtype === "string") return text;
  if (text === MISSING_TEXT) return null;
  return ["true", "false"].includes(text) ? Number(text === "true") : Number(text);
}

function clock(total) {
  const pad = (number) => String(Math.floor(number)).padStart(2, "0");
  return `${pad((total / 60) % 24)}:${pad(total % 60)}`;
}

function minutes(text) {
  const [hours, rest] = text.split(":").map(Number);
  return hours * 60 + rest;
}

function usual(schema) {
  const entries = Object.entries(schema.columns).map(([name, column]) => {
    if (column.kind === "choice") return [name, column.values[0] ?? MISSING_TEXT];
    if (column.kind === "flag") return [name, column.typical > 0.5];
    return [name, column.dtype === "int64" ? Math.round(column.typical) : column.typical];
  });
  return Object.fromEntries(entries);
}

function draw(schema) {
  document.title = `${schema.title} · assay`;
  byId("title").textContent = schema.title;
  const named = `Model ${schema.name}, version ${schema.version}`;
  byId("model").textContent = `${named}: ${schema.description}.`;
  for (const { title, columns } of schema.groups) {
    const fields = columns.map((name) => field(name, schema.columns[name]));
    byId("groups").append(
      element(
        "fieldset",
        {},
        element("legend", {}, title),
        element("div", { className: "fields" }, ...fields),
      ),
    );
  }
  schema.examples.forEach((_, i) => {
    byId("example").append(element("option", { value: String(i) }, `held-out row ${i + 1}`));
  });
  byId("example").parentElement.hidden = schema.examples.length === 0;
  byId("classes").append(
    ...schema.classes.map((name) =>
      element(
        "div",
        {},
        element("dt", {}, name),
        element("dd", { className: "track" }, element("div", { className: "bar" })),
        element("dd", { className: "share" }),
      ),
    ),
  );
}

function tell(schema, { label, shares }, milliseconds) {
  byId("label").textContent = label;
  [...byId("classes").children].forEach((row, i) => {
    row.querySelector(".bar").style.width = `${100 * shares[i]}%`;
    row.querySelector(".share").textContent = `${(100 * shares[i]).toFixed(1)} %`;
    row.querySelector(".share").dataset.share = String(shares[i]);
    row.querySelector("dt").classList.toggle("chosen", schema.classes[i] === label);
  });
  byId("status").textContent = `Computed here in ${milliseconds.toFixed(1)} ms.`;
}

async function start() {
  const model = await load();
  const { schema } = model;
  draw(schema);
  const ask = async () => {
    if (!byId("form").checkValidity()) return;
    const started = performance.now();
    const answer = await predict(model, read(schema));
    tell(schema, answer, performance.now() - started);
  };
  const begin = () => {
    const chosen = byId("example").value;
    show(schema, chosen === "" ? usual(schema) : schema.examples[Number(chosen)]);
    return ask();
  };
  byId("form").addEventListener("submit", (event) => {
    event.preventDefault();
    ask();
  });
  byId("form").addEventListener("change", ({ target }) =>
    target.id === "example" ? begin() : ask(),
  );
  await begin();
  document.querySelector("button").disabled = false;
  byId("form").ariaBusy = "false";
}

start().catch((error) => {
  byId("title").textContent = "The model could not be loaded";
  byId("status").textContent = String(error);
});
