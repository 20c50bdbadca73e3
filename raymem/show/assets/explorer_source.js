// Where the explorer's arrays come from: the page itself, or the server of `raymem explore`.
const root = document.getElementById("explorer");
const about = JSON.parse(document.getElementById("explorer-about").textContent);
const kept = new Map();

function fromBase64(text) {
  const binary = atob(text);
  const bytes = new Uint8Array(binary.length);
  for (let i = 0; i < binary.length; i += 1) bytes[i] = binary.charCodeAt(i);
  return bytes;
}

async function packedBytes(name) {
  if (about.served) {
    const answer = await fetch("blob/" + name);
    if (!answer.ok) throw new Error(name + ": " + await answer.text());
    return new Uint8Array(await answer.arrayBuffer());
  }
  const element = root.querySelector('script[data-blob="' + name + '"]');
  if (!element) throw new Error("this page does not have " + name);
  const bytes = fromBase64(element.textContent);
  element.remove();
  return bytes;
}

async function inflate(bytes) {
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

/** What `name` holds, decoded once. */
function blob(name, decode) {
  if (!kept.has(name)) kept.set(name, packedBytes(name).then(inflate).then(decode));
  return kept.get(name);
}

/** First all first bytes, then all second ones: numbers of one array are alike, byte by byte. */
function asArray(Type) {
  return function (planes) {
    const size = Type.BYTES_PER_ELEMENT, n = planes.length / size;
    const bytes = new Uint8Array(planes.length);
    for (let plane = 0; plane < size; plane += 1) {
      for (let i = 0, from = plane * n; i < n; i += 1) bytes[i * size + plane] = planes[from + i];
    }
    return new Type(bytes.buffer);
  };
}

const asText = function (bytes) { return new TextDecoder().decode(bytes); };
const asIs = function (bytes) { return bytes; };

function isKnown(epsilon, name) { return about.columns[epsilon].includes(name); }

/** A measure at an epsilon, NaN where it is not defined; null if it is not here. */
async function column(epsilon, name) {
  return isKnown(epsilon, name) ? blob("m/" + epsilon + "/" + name, asArray(Float32Array)) : null;
}

/** [lower end, upper end] of a measure's 95% intervals as arrays, or null. */
async function interval(epsilon, measure) {
  const around = await Promise.all(measure.around.map(function (n) { return column(epsilon, n); }));
  if (!around.length || around.includes(null)) return null;
  if (around.length === 2) return around;
  const middle = await column(epsilon, measure.name), error = around[0];
  return [
    middle.map(function (v, i) { return v - 1.96 * error[i]; }),
    middle.map(function (v, i) { return v + 1.96 * error[i]; }),
  ];
}

let ids, labels, groups, detail;

async function readExamples() {
  [ids, labels, groups] = await Promise.all([
    blob("ids", function (b) { return JSON.parse(asText(b)); }),
    blob("labels", asArray(Int32Array)),
    blob("groups", asArray(Int32Array)),
  ]);
  detail = new Map();
  if (about.served) return;
  const rows = await blob("detail", asArray(Int32Array));
  rows.forEach(function (row, place) { detail.set(row, place); });
}

function className(row) {
  return labels[row] < 0 ? "no label" : about.classes[labels[row]];
}

function splitOf(row) { return row < about.n_train ? "training" : "test"; }

const MEDIA = {0x89: "image/png", 0xff: "image/jpeg", 0x52: "image/webp"};
const pictureUrls = new Map();

/** The URL of an example's picture, or null. */
async function pictureUrl(row) {
  if (about.served) return about.pictures ? "picture/" + row : null;
  if (!detail.has(row) || !about.pictures) return null;
  if (!pictureUrls.has(row)) {
    const [starts, bytes] = await Promise.all([
      blob("pictures/starts", asArray(Uint32Array)), blob("pictures/bytes", asIs),
    ]);
    const place = detail.get(row);
    const one = bytes.subarray(starts[place], starts[place + 1]);
    pictureUrls.set(row, one.length
      ? URL.createObjectURL(new Blob([one], {type: MEDIA[one[0]]})) : null);
  }
  return pictureUrls.get(row);
}

/** What each model made of an example: bit 0 trained on it, bit 1 right; null if not here. */
async function outcomes(epsilon, row) {
  const trials = about.trials[epsilon];
  if (!trials) return null;
  if (about.served) return blob("outcomes/" + epsilon + "/" + row, asIs);
  if (!detail.has(row)) return null;
  const bytes = await blob("outcomes/" + epsilon, asIs);
  const width = Math.ceil(trials / 4), start = detail.get(row) * width;
  return Uint8Array.from({length: trials}, function (_, t) {
    return bytes[start + (t >> 2)] >> 2 * (t & 3) & 3;
  });
}

/** Relations of an example: [{row, influence}], the strongest of each sign first. */
async function relations(epsilon, row) {
  if (!about.pairs.includes(epsilon)) return [];
  const base = "pairs/" + epsilon + "/";
  const [train, test, influence] = await Promise.all([
    blob(base + "train", asArray(Int32Array)), blob(base + "test", asArray(Int32Array)),
    blob(base + "influence", asArray(Float32Array)),
  ]);
  const [own, other] = row < about.n_train ? [train, test] : [test, train];
  const found = [];
  for (let i = 0; i < own.length; i += 1) {
    if (own[i] === row) found.push({row: other[i], influence: influence[i]});
  }
  return found;
}

/** The near duplicates of an example. */
function copies(row) {
  const found = [];
  if (groups[row] < 0) return found;
  groups.forEach(function (group, other) {
    if (group === groups[row] && other !== row) found.push(other);
  });
  return found;
}

/** All measures of one example: [{measure, value, low, high}]. */
async function numbersOf(epsilon, row) {
  const known = about.measures.filter(function (m) { return isKnown(epsilon, m.name); });
  if (about.served) {
    const answer = await (await fetch("example/" + epsilon + "/" + row)).json();
    return known.map(function (m) { return Object.assign({measure: m}, answer[m.name]); });
  }
  return Promise.all(known.map(async function (measure) {
    const values = await column(epsilon, measure.name), ends = await interval(epsilon, measure);
    return {measure, value: values[row], low: ends && ends[0][row], high: ends && ends[1][row]};
  }));
}

let vegaReady = null;

/** Vega and Vega-Lite, run when they are first needed. */
function loadVega() {
  vegaReady = vegaReady || blob("vega", asText).then(function (code) {
    const script = document.createElement("script");
    script.textContent = code;
    document.head.appendChild(script);
  });
  return vegaReady;
}
