// The scatter plot: drawing, thinning, the nearest point, the brush.
const MOST_DRAWN = 8000;
const CELLS = 64;
const REACH = 16;
const HEIGHT = 380;

/** Which of these rows are drawn: all in thin cells of the plot, k evenly in each dense one. */
function thin(rows, xs, ys) {
  if (rows.length <= MOST_DRAWN) return {rows, most: 0};
  const [fx, fy] = [xs, ys].map(function (values) {
    let low = Infinity, high = -Infinity;
    rows.forEach(function (r) { low = Math.min(low, values[r]); high = Math.max(high, values[r]); });
    const scale = high > low ? (CELLS - 1e-6) / (high - low) : 0;
    return function (row) { return Math.floor((values[row] - low) * scale); };
  });
  const count = new Uint32Array(CELLS * CELLS);
  const cells = Uint16Array.from(rows, function (row) { return fx(row) * CELLS + fy(row); });
  cells.forEach(function (cell) { count[cell] += 1; });
  const total = function (k) {
    return count.reduce(function (sum, c) { return sum + Math.min(c, k); }, 0);
  };
  let least = 1, most = rows.length;
  while (most - least > 1) {
    const k = least + most >> 1;
    if (total(k) <= MOST_DRAWN) least = k; else most = k;
  }
  const seen = new Uint32Array(CELLS * CELLS), k = least;
  return {
    most: k,
    rows: rows.filter(function (_, i) {
      const c = count[cells[i]], j = seen[cells[i]];
      seen[cells[i]] += 1;
      return c <= k || Math.floor((j + 1) * k / c) > Math.floor(j * k / c);
    }),
  };
}

function colours() {
  const style = getComputedStyle(root);
  return Object.fromEntries(["ink", "soft", "paper", "line", "accent", "second"].map(
    function (name) { return [name, style.getPropertyValue("--" + name).trim()]; }));
}

/** The specification of raymem/show/explorer_spec.py with what is chosen now. */
function specification(chosen, width) {
  const c = colours(), spec = structuredClone(about.spec);
  const paint = {labelColor: c.ink, titleColor: c.ink, gridColor: c.line, domainColor: c.soft,
                 tickColor: c.soft};
  Object.assign(spec, {width, height: HEIGHT, background: "transparent",
                       data: {name: "points", values: chosen.points}});
  Object.assign(spec.config, {axis: paint, legend: {labelColor: c.ink, titleColor: c.ink}});
  for (const axis of ["x", "y"]) {
    spec.encoding[axis].title = chosen[axis].label;
    if (chosen.log[axis]) spec.encoding[axis].scale = {type: "log", padding: 8};
  }
  spec.encoding.color.scale.range = [c.accent, c.second];
  spec.params[0].select.mark = {fill: c.ink, fillOpacity: 0.08, stroke: c.ink};
  return spec;
}

class Plot {
  /** `told` is called with a brush {x: [low, high], y: [low, high]}, or null for none. */
  constructor(element, told) {
    this.element = element;
    this.canvas = element.querySelector(".explorer-canvas");
    this.told = told;
    this.view = null;
    this.rows = [];
    this.silent = false;
  }

  /** Draw `chosen`: x, y measures, xs, ys arrays, rows, log. Returns what was thinned. */
  async draw(chosen) {
    const thinned = thin(chosen.rows, chosen.xs, chosen.ys);
    this.rows = thinned.rows;
    this.chosen = chosen;
    chosen.points = Array.from(this.rows, function (row) {
      return {x: chosen.xs[row], y: chosen.ys[row], split: splitOf(row)};
    });
    if (this.view) this.view.finalize();
    const width = Math.max(200, this.canvas.clientWidth);
    const compiled = vegaLite.compile(specification(chosen, width)).spec;
    this.view = new vega.View(vega.parse(compiled), {
      renderer: "canvas", container: this.canvas, logLevel: vega.Error,
    });
    await this.view.runAsync();
    this.canvas.querySelector("canvas").setAttribute("aria-hidden", "true");
    this.place();
    this.view.addSignalListener("brush", (_, value) => {
      if (this.silent) return;
      this.told(value.x && value.y && value.x[0] !== value.x[1] && value.y[0] !== value.y[1]
        ? {x: ordered(value.x), y: ordered(value.y)} : null);
    });
    return thinned;
  }

  /** Where each drawn point is, in pixels of the canvas. */
  place() {
    const [left, top] = this.view.origin(), pad = this.view.padding();
    const [x, y] = [this.view.scale("x"), this.view.scale("y")];
    this.px = Float32Array.from(this.rows, (row) => x(this.chosen.xs[row]) + left + pad.left);
    this.py = Float32Array.from(this.rows, (row) => y(this.chosen.ys[row]) + top + pad.top);
  }

  /** The place, among those drawn, of the point nearest to a position; -1 if none is near. */
  nearest(x, y) {
    let best = -1, least = REACH * REACH;
    for (let i = 0; i < this.px.length; i += 1) {
      const d = (this.px[i] - x) ** 2 + (this.py[i] - y) ** 2;
      if (d < least) { least = d; best = i; }
    }
    return best;
  }

  /** The next point in a direction: the nearest within 45 degrees of it. */
  next(from, dx, dy) {
    if (from < 0) return this.px.length ? 0 : -1;
    let best = from, least = Infinity;
    for (let i = 0; i < this.px.length; i += 1) {
      const x = this.px[i] - this.px[from], y = this.py[i] - this.py[from];
      const along = x * dx + y * dy, d = x * x + y * y;
      if (along > 0 && along * along * 2 >= d && d < least) { least = d; best = i; }
    }
    return best;
  }

  /** Show a brush, or none; nobody is told, for its ends come back rounded to pixels. */
  async brush(range) {
    this.silent = true;
    const [x, y] = [this.view.scale("x"), this.view.scale("y")];
    this.view.signal("brush_x", range ? range.x.map(x) : [0, 0]);
    this.view.signal("brush_y", range ? range.y.map(y) : [0, 0]);
    await this.view.runAsync();
    this.silent = false;
  }

  /** Where an example is, in pixels of the canvas. */
  position(row) {
    const [left, top] = this.view.origin(), pad = this.view.padding();
    return [this.view.scale("x")(this.chosen.xs[row]) + left + pad.left,
            this.view.scale("y")(this.chosen.ys[row]) + top + pad.top];
  }

  /** Mark an example with a ring; none if it is not in the plot. */
  ring(element, row) {
    const [x, y] = this.position(row);
    element.hidden = !(Number.isFinite(x) && Number.isFinite(y));
    element.style.transform = "translate(" + x + "px," + y + "px)";
    return [x, y];
  }
}

function ordered(range) { return range[0] <= range[1] ? range : [range[1], range[0]]; }
