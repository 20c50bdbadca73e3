// The explorer: menus, tooltip, the panel of one example, gallery and table of a selection.
const $ = function (id) { return document.getElementById("explorer-" + id); };
const find = function (name) { return root.querySelector(".explorer-" + name); };
const GALLERY = 32, TABLE = 20, RELATIONS = 6;
const state = {brush: null, selected: [], shown: 1, sort: "x", down: true, near: -1, open: null};
let plot, chosen = null;

/** An element with text (never markup) and attributes. */
function make(tag, text, attributes) {
  const element = document.createElement(tag);
  if (text !== null && text !== undefined) element.textContent = text;
  Object.entries(attributes || {}).forEach(function ([name, value]) {
    element.setAttribute(name, value);
  });
  return element;
}

function format(value) {
  if (value === null || value === undefined || Number.isNaN(value)) return "not known";
  if (Number.isInteger(value)) return value.toLocaleString("en");
  const size = Math.abs(value);
  return size >= 0.001 && size < 10000 ? value.toFixed(3) : value.toExponential(2);
}

function withInterval(value, low, high) {
  const known = Number.isFinite(low) && Number.isFinite(high);
  return format(value) + (known ? " [" + format(low) + ", " + format(high) + "]" : "");
}

function named(row) {
  return splitOf(row) + " example " + ids[row] + ", labelled " + className(row);
}

/** A frame with the picture of an example, if there is one. */
function picture(row) {
  const frame = make("span", null, {
    class: "explorer-picture", role: "img", "aria-label": "no picture of " + named(row),
  });
  pictureUrl(row).then(function (url) {
    if (!url) return;
    const image = make("img", null, {alt: named(row)});
    image.onload = function () {
      frame.removeAttribute("role");
      frame.removeAttribute("aria-label");
      frame.replaceChildren(image);
    };
    image.src = url;
  });
  return frame;
}

function tile(row, text) {
  const button = make("button", null, {type: "button", class: "explorer-tile"});
  button.append(picture(row), make("span", className(row)), make("span", ids[row]));
  if (text) button.append(make("span", text));
  button.addEventListener("click", function () { open(row, true); });
  return button;
}

// Menus

function fill(select, entries, value) {
  select.replaceChildren(...entries.map(function ([key, text]) {
    return make("option", text, {value: key});
  }));
  if (entries.some(function ([key]) { return key === value; })) select.value = value;
}

function fillMeasures() {
  const known = about.measures.filter(function (m) { return isKnown($("epsilon").value, m.name); });
  const entries = known.map(function (m) { return [m.name, m.label]; });
  const has = function (name) { return known.some(function (m) { return m.name === name; }); };
  const first = has("memorization") ? "memorization" : entries[0][0];
  const second = ["curvature_out", "loss_out", "accuracy_out"].find(has) || entries.at(-1)[0];
  fill($("x"), entries, $("x").value || first);
  fill($("y"), entries, $("y").value || second);
}

function fillMenus() {
  fill($("epsilon"), about.epsilons.map(function (e) {
    return [e, e === "inf" ? "none (not private)" : e];
  }), about.epsilons[0]);
  const classes = about.classes.map(function (name, k) { return [String(k), name]; });
  fill($("class"), [["", "all"], ...classes], "");
  fillMeasures();
  $("epsilon").addEventListener("change", function () { fillMeasures(); choose(); });
  ["x", "y", "class", "log-x", "log-y"].forEach(function (id) {
    $(id).addEventListener("change", choose);
  });
}

/** Draw what the menus say; the selection is empty again. */
async function choose() {
  const epsilon = $("epsilon").value, label = $("class").value;
  const measure = function (id) {
    return about.measures.find(function (m) { return m.name === $(id).value; });
  };
  const x = measure("x"), y = measure("y"), log = {x: $("log-x").checked, y: $("log-y").checked};
  const [xs, ys, xEnds, yEnds] = await Promise.all([
    column(epsilon, x.name), column(epsilon, y.name), interval(epsilon, x), interval(epsilon, y),
  ]);
  const rows = [];
  for (let row = 0; row < about.n; row += 1) {
    if (label !== "" && labels[row] !== Number(label)) continue;
    if (!Number.isFinite(xs[row]) || !Number.isFinite(ys[row])) continue;
    if ((log.x && xs[row] <= 0) || (log.y && ys[row] <= 0)) continue;
    rows.push(row);
  }
  chosen = {epsilon, x, y, xs, ys, xEnds, yEnds, rows, log};
  $("x-meaning").textContent = x.label + ": " + x.meaning;
  $("y-meaning").textContent = y.label + ": " + y.meaning;
  find("legend").hidden = !(rows.length && rows[0] < about.n_train && rows.at(-1) >= about.n_train);
  await draw();
  select(null);
}

async function draw() {
  hideTip();
  const thinned = await plot.draw(chosen);
  const n = chosen.rows.length, drawn = plot.rows.length;
  find("plot").setAttribute("aria-label", "Scatter plot of " + n.toLocaleString("en") +
    " examples: " + chosen.x.label + " across, " + chosen.y.label + " up");
  const notes = [...about.sampled];
  if (thinned.most) {
    notes.unshift(drawn.toLocaleString("en") + " of " + n.toLocaleString("en") + " points are " +
      "drawn: all where the plot is thin, " + thinned.most + " in each dense spot; selecting " +
      "and copying use all.");
  }
  find("sampled").textContent = notes.join(" ");
  ringOpen();
}

function ringOpen() {
  const there = state.open !== null && chosen && chosen.rows.includes(state.open);
  if (there) plot.ring(find("ring-open"), state.open); else find("ring-open").hidden = true;
}

// Pointing

function hideTip() {
  state.near = -1;
  find("tip").hidden = find("ring-near").hidden = true;
}

function showTip(place) {
  if (place < 0) { hideTip(); return; }
  if (place === state.near) return;
  state.near = place;
  const row = plot.rows[place], tip = find("tip"), text = make("div");
  const line = function (measure, values, ends) {
    const words = withInterval(values[row], ends && ends[0][row], ends && ends[1][row]);
    text.append(make("p", measure.label + ": " + words));
  };
  text.append(make("p", ids[row]), make("p", splitOf(row) + ", " + className(row)));
  line(chosen.x, chosen.xs, chosen.xEnds);
  line(chosen.y, chosen.ys, chosen.yEnds);
  tip.replaceChildren(picture(row), text);
  tip.hidden = false;
  const [x, y] = plot.ring(find("ring-near"), row);
  const left = x + 14 + tip.offsetWidth > find("plot").clientWidth ? x - 14 - tip.offsetWidth : x + 14;
  const top = Math.min(Math.max(y - 30, 0), Math.max(0, HEIGHT - tip.offsetHeight));
  tip.style.transform = "translate(" + Math.max(0, left) + "px," + top + "px)";
}

const ARROWS = {
  ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1],
};

function watchPlot() {
  const element = find("plot"), canvas = find("canvas");
  let down = null;
  const at = function (event) {
    const box = canvas.getBoundingClientRect();
    return [event.clientX - box.left, event.clientY - box.top];
  };
  canvas.addEventListener("pointerdown", function (event) { down = at(event); hideTip(); });
  canvas.addEventListener("pointermove", function (event) {
    if (chosen && !event.buttons) showTip(plot.nearest(...at(event)));
  });
  canvas.addEventListener("pointerleave", hideTip);
  canvas.addEventListener("click", function (event) {
    const [x, y] = at(event);
    if (down && Math.hypot(x - down[0], y - down[1]) > 4) return;
    const place = plot.nearest(x, y);
    if (place >= 0) open(plot.rows[place], false);
  });
  element.addEventListener("keydown", function (event) {
    if (event.key in ARROWS) {
      event.preventDefault();
      showTip(plot.next(state.near, ...ARROWS[event.key]));
      if (state.near >= 0) find("status").textContent = find("tip").lastChild.innerText;
    } else if (event.key === "Enter" && state.near >= 0) {
      open(plot.rows[state.near], true);
    } else if (event.key === "Escape") {
      hideTip();
      clear();
    }
  });
  element.addEventListener("blur", hideTip);
}

// The selection

function clear() {
  plot.brush(null);
  select(null);
}

let waiting = null;

/** A brush moves many times a second; what it selects is shown once a frame. */
function brushed(range) {
  state.brush = range;
  waiting = waiting || requestAnimationFrame(function () {
    waiting = null;
    select(state.brush);
  });
}

function select(range) {
  state.brush = range;
  const {xs, ys, rows} = chosen;
  state.selected = range ? rows.filter(function (row) {
    return xs[row] >= range.x[0] && xs[row] <= range.x[1] &&
      ys[row] >= range.y[0] && ys[row] <= range.y[1];
  }) : rows.slice();
  const round = function (v) { return String(Number(v.toPrecision(4))); };
  ["x", "y"].forEach(function (axis) {
    [0, 1].forEach(function (end) {
      const input = $(axis + end);
      if (document.activeElement !== input) input.value = range ? round(range[axis][end]) : "";
    });
  });
  state.shown = 1;
  sortSelection();
  showSelection();
}

function fromRanges() {
  const read = function (axis) {
    const values = axis === "x" ? chosen.xs : chosen.ys;
    const all = chosen.rows.reduce(function (ends, row) {
      return [Math.min(ends[0], values[row]), Math.max(ends[1], values[row])];
    }, [Infinity, -Infinity]);
    return [0, 1].map(function (end) {
      const text = $(axis + end).value;
      return text === "" ? all[end] : Number(text);
    });
  };
  const range = {x: read("x"), y: read("y")};
  select(range);
  plot.brush(range);
}

function sortSelection() {
  const {xs, ys} = chosen;
  const key = {
    x: function (row) { return xs[row]; }, y: function (row) { return ys[row]; },
    id: function (row) { return ids[row]; }, class: className,
  }[state.sort];
  const sign = state.down ? -1 : 1;
  state.selected.sort(function (a, b) {
    const [p, q] = [key(a), key(b)];
    return sign * (typeof p === "string" ? p.localeCompare(q) : p - q) || a - b;
  });
}

function showSelection() {
  const n = state.selected.length, of = chosen.rows.length;
  find("count").textContent = state.brush
    ? n.toLocaleString("en") + " of " + of.toLocaleString("en") + " examples selected"
    : "All " + of.toLocaleString("en") + " examples; drag in the plot to select some";
  const shown = state.selected.slice(0, GALLERY * state.shown);
  find("gallery").replaceChildren(...shown.map(function (row) {
    return tile(row, format(chosen.xs[row]));
  }));
  find("caption").textContent = "Below each picture: class, id, " + chosen.x.label + ".";
  showTable();
  $("more").hidden = n <= Math.min(GALLERY, TABLE) * state.shown;
}

const HEADS = ["id", "class", "x", "y"];

function showTable() {
  const table = find("table"), head = make("tr");
  const titles = {id: "example", class: "class", x: chosen.x.label, y: chosen.y.label};
  HEADS.forEach(function (key) {
    const th = make("th", null, {scope: "col", "aria-sort": state.sort !== key ? "none"
      : state.down ? "descending" : "ascending"});
    const button = make("button", titles[key], {type: "button", "data-key": key});
    button.addEventListener("click", function () {
      state.down = state.sort === key ? !state.down : key === "x" || key === "y";
      state.sort = key;
      sortSelection();
      showSelection();
      table.querySelector('button[data-key="' + key + '"]').focus();
    });
    th.append(button);
    head.append(th);
  });
  table.tHead.replaceChildren(head);
  const {xs, ys, xEnds, yEnds} = chosen;
  table.tBodies[0].replaceChildren(...state.selected.slice(0, TABLE * state.shown).map(
    function (row) {
      const tr = make("tr"), id = make("td");
      const button = make("button", ids[row], {type: "button", class: "explorer-id"});
      button.addEventListener("click", function () { open(row, true); });
      id.append(button);
      tr.append(
        id, make("td", className(row)),
        make("td", withInterval(xs[row], xEnds && xEnds[0][row], xEnds && xEnds[1][row]),
          {class: "number"}),
        make("td", withInterval(ys[row], yEnds && yEnds[0][row], yEnds && yEnds[1][row]),
          {class: "number"}));
      return tr;
    }));
}

// Copying

function asCsv() {
  const quote = function (text) { return '"' + String(text).replaceAll('"', '""') + '"'; };
  const number = function (v) { return Number.isFinite(v) ? String(Number(v.toPrecision(5))) : ""; };
  const of = [[chosen.x, chosen.xs, chosen.xEnds], [chosen.y, chosen.ys, chosen.yEnds]];
  const head = ["example_id", "split", "class", "epsilon"];
  of.forEach(function ([m, , ends]) {
    head.push(m.name, ...(ends ? [m.name + "_low", m.name + "_high"] : []));
  });
  const lines = state.selected.map(function (row) {
    const cells = [quote(ids[row]), splitOf(row) === "test" ? "test" : "train",
                   quote(className(row)), chosen.epsilon];
    of.forEach(function ([, values, ends]) {
      cells.push(number(values[row]));
      if (ends) cells.push(number(ends[0][row]), number(ends[1][row]));
    });
    return cells.join(",");
  });
  return [head.join(","), ...lines].join("\n") + "\n";
}

async function copyText(text, what) {
  const note = find("copied"), area = find("text");
  try {
    await navigator.clipboard.writeText(text);
    area.hidden = true;
    note.textContent = what + " copied";
  } catch {
    // Not allowed here, as in some notebooks: the text is shown, selected.
    area.value = text;
    area.hidden = false;
    area.select();
    note.textContent = what + " below: copy with the keyboard";
  }
}

function save(name, url) {
  const link = make("a", null, {href: url, download: name});
  link.click();
}

function saveText(name, type, text) {
  save(name, URL.createObjectURL(new Blob([text], {type})));
}

// One example

function section(title, ...content) {
  return content.length ? [make("h4", title), ...content] : [];
}

function numberTable(rows) {
  const table = make("table"), body = make("tbody");
  rows.forEach(function ([name, text]) {
    const tr = make("tr");
    tr.append(make("th", name, {scope: "row"}), make("td", text, {class: "number"}));
    body.append(tr);
  });
  table.append(body);
  return table;
}

function strip(codes) {
  const arms = [[1, "trained on it", 0], [0, "did not", 1]];
  const canvas = make("canvas", null, {class: "explorer-strip", role: "img"});
  const style = getComputedStyle(root), unit = 2;
  canvas.width = codes.length * unit;
  canvas.height = 44;
  const pen = canvas.getContext("2d");
  codes.forEach(function (code, t) {
    const right = code & 2, lane = code & 1 ? 0 : 22;
    pen.fillStyle = style.getPropertyValue(right ? "--accent" : "--second");
    pen.fillRect(t * unit, lane + (right ? 2 : 11), unit, right ? 18 : 9);
  });
  const counts = arms.map(function ([inside, words]) {
    const here = codes.filter(function (code) { return (code & 1) === inside; });
    const right = here.filter(function (code) { return code & 2; }).length;
    return right + " of " + here.length + " models that " + words + " get it right";
  });
  canvas.setAttribute("aria-label", counts.join("; "));
  const note = "Above: models that trained on it; below: models that did not. Tall: right; " +
    "short: wrong. In order of trials" +
    (codes.length < about.all_trials[chosen.epsilon] ? ", the first " + codes.length : "") + ".";
  return [canvas, make("p", counts.join("; ") + ".", {class: "small"}),
          make("p", note, {class: "small"})];
}

async function atEpsilons(row) {
  if (about.epsilons.length < 2) return [];
  const measure = about.measures.find(function (m) { return m.name === "memorization"; });
  if (!measure) return [];
  const rows = await Promise.all(about.epsilons.map(async function (epsilon) {
    const values = await column(epsilon, "memorization");
    const ends = values && await interval(epsilon, measure);
    return [epsilon === "inf" ? "not private" : "epsilon " + epsilon,
            values ? withInterval(values[row], ends && ends[0][row], ends && ends[1][row]) : ""];
  }));
  return [numberTable(rows)];
}

function related(row, found) {
  const train = row < about.n_train;
  const part = function (title, some) {
    const holder = make("div", null, {class: "explorer-relations"});
    holder.append(...some.slice(0, RELATIONS).map(function (r) {
      return tile(r.row, "influence " + format(r.influence));
    }));
    return some.length ? [make("h4", title), holder] : [];
  };
  const helps = found.filter(function (r) { return r.influence > 0; });
  const hurts = found.filter(function (r) { return r.influence < 0; }).reverse();
  return [
    ...part(train ? "Test examples it helps most" : "Training examples that help it most", helps),
    ...part(train ? "Test examples it hurts most" : "Training examples that hurt it most", hurts),
  ];
}

async function open(row, focus) {
  const panel = find("panel"), epsilon = chosen.epsilon;
  state.open = row;
  ringOpen();
  const close = make("button", "Close", {type: "button"});
  close.addEventListener("click", function () {
    state.open = null;
    ringOpen();
    panel.replaceChildren(make("p", "Click a point or a picture to see the example here.",
      {class: "small"}));
    find("plot").focus();
  });
  const head = [
    make("h3", ids[row]), make("p", splitOf(row) + " example, class " + className(row)),
    picture(row),
  ];
  panel.replaceChildren(...head, close);
  if (focus) panel.focus();
  if (panel.getBoundingClientRect().top > innerHeight - 100 || panel.getBoundingClientRect().top < 0) {
    panel.scrollIntoView({block: "nearest"});
  }
  const [numbers, others, found, codes] = await Promise.all([
    numbersOf(epsilon, row), atEpsilons(row), relations(epsilon, row),
    outcomes(epsilon, row).catch(function (error) { return String(error); }),
  ]);
  if (state.open !== row) return;
  const same = copies(row), holder = make("div", null, {class: "explorer-relations"});
  holder.append(...same.slice(0, 2 * RELATIONS).map(function (r) { return tile(r, splitOf(r)); }));
  const known = numbers.filter(function (n) { return Number.isFinite(n.value); });
  panel.replaceChildren(
    ...head,
    ...section("Outcome of each model", ...(codes && codes.length ? strip(codes) : [])),
    ...related(row, found),
    ...section("Near duplicates", ...(same.length ? [holder] : [])),
    ...section("Memorization by epsilon", ...others),
    ...section("Measures", numberTable(known.map(function (n) {
      return [n.measure.label, withInterval(n.value, n.low, n.high)];
    }))),
    close);
}

async function start() {
  await Promise.all([readExamples(), loadVega()]);
  find("body").hidden = false;
  plot = new Plot(find("plot"), brushed);
  fillMenus();
  watchPlot();
  await choose();
  find("status").textContent = "";
  $("clear").addEventListener("click", clear);
  ["x0", "x1", "y0", "y1"].forEach(function (id) { $(id).addEventListener("change", fromRanges); });
  $("more").addEventListener("click", function () { state.shown += 1; showSelection(); });
  $("ids").addEventListener("click", function () {
    copyText(state.selected.map(function (row) { return ids[row]; }).join("\n") + "\n", "ids");
  });
  $("csv").addEventListener("click", function () { copyText(asCsv(), "CSV"); });
  $("save").addEventListener("click", function () { saveText("selection.csv", "text/csv", asCsv()); });
  $("png").addEventListener("click", async function () {
    save("explorer.png", await plot.view.toImageURL("png", 3));
  });
  $("svg").addEventListener("click", async function () {
    saveText("explorer.svg", "image/svg+xml", await plot.view.toSVG());
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  let width = find("canvas").clientWidth;
  new ResizeObserver(function () {
    if (Math.abs(find("canvas").clientWidth - width) < 2) return;
    width = find("canvas").clientWidth;
    draw();
  }).observe(find("canvas"));
  // For scripts of others: open an example, or where its point is.
  window.raymemExplorer = {open: (row) => open(row, false), place: (row) => plot.position(row)};
  root.dataset.ready = "yes";
}

function fail(error) {
  find("status").textContent = "The explorer cannot be shown: " + error.message +
    ". It needs a browser of 2023 or later; `raymem example STORE ID` has the same numbers.";
}

// Nothing is unpacked before it is near the screen.
new IntersectionObserver(function (entries, observer) {
  if (!entries.some(function (entry) { return entry.isIntersecting; })) return;
  observer.disconnect();
  start().catch(fail);
}, {rootMargin: "600px"}).observe(root);
