// Line plots as SVG that fill their element; long lines are drawn by the extremes of each column.

// Five digits; `range` says how many of them differ between neighbours.
function shown(value, range) {
  if (value === 0) return "0";
  if (range) {
    const digits = clamp(2 - Math.floor(Math.log10(range)), 0, 12);
    if (digits < 7 && Math.abs(value) < 1e7) return value.toFixed(digits).replace("-", "−");
  }
  const size = Math.abs(value);
  const text = size >= 1e7 || size < 1e-3 ? value.toExponential(3) : String(Number(value.toPrecision(size >= 1e4 ? 7 : 5)));
  return text.replace("-", "−");
}

// [value, text] at round numbers.
function ticks(low, high, count) {
  const rough = (high - low) / count, power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find((factor) => factor * power >= rough);
  const out = [], digits = clamp(-Math.floor(Math.log10(step) + 1e-9), 0, 12);
  for (let k = Math.ceil(low / step - 1e-9); k * step <= high + step * 1e-9; k++) {
    const text = Math.abs(k * step) < 1e6 && step >= 1e-6 ? (k * step).toFixed(digits).replace("-", "−") : shown(k * step);
    out.push([k * step, text]);
  }
  return out;
}

// [logarithm, text]: one tick per decade, or three where the values span few; they span more than one.
function logTicks(low, high) {
  const out = [], span = high - low;
  const factors = span < 1.5 ? [1, 2, 5] : [1], every = Math.max(1, Math.ceil(span / 6));
  for (let p = Math.floor(low); p <= Math.ceil(high); p++) {
    if (p % every) continue;
    for (const factor of factors) out.push(p + Math.log10(factor));
  }
  const inside = out.filter((t) => t >= low && t <= high);
  return inside.map((t) => [t, shown(Number((10 ** t).toPrecision(3)))]);
}

function element(name, attributes, text) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

class Plot {
  constructor(place) {
    this.place = place;
    new ResizeObserver(() => this.draw()).observe(place);
  }

  // lines: one [values] or several on the same `xs` (numbers, ascending); options: x, y (labels), log, mark, from, dashed
  // (all lines but the first), range (at least [low, high] is seen).
  show(xs, lines, options) {
    Object.assign(this, { xs, options });
    this.lines = options.log ? lines.map((line) => Array.from(line, (v) => (v > 0 ? Math.log10(v) : NaN))) : lines;
    this.draw();
  }

  draw() {
    const width = this.place.clientWidth, height = this.place.clientHeight;
    if (!this.xs || !width || !height) return;
    let [low, high] = this.options.range ?? [Infinity, -Infinity];
    for (const line of this.lines) for (const v of line) if (Number.isFinite(v)) (low = Math.min(low, v)), (high = Math.max(high, v));
    const svg = element("svg", { viewBox: `0 0 ${width} ${height}`, "aria-hidden": "true" });
    this.place.replaceChildren(svg);
    if (low > high) return void svg.append(element("text", { x: 8, y: 20 }, "no values"));
    const pad = high > low ? 0.04 * (high - low) : Math.abs(high) * 0.01 || 1;
    const first = this.options.from ?? this.xs[0], reach = this.xs[this.xs.length - 1] - first || 1;
    const [x, y, across] = this.frame(svg, width, height, [first, reach], [low - pad, high + pad]);
    this.lines.forEach((line, k) => {
      const dashed = k && this.options.dashed ? { class: "dashed" } : {};
      svg.append(element("path", { d: this.path(line, x, y, across), ...dashed }));
    });
  }

  // Grid, numbers and labels; the places of coordinates along both axes, and the length of the first in px.
  frame(svg, width, height, [first, reach], [low, high]) {
    const labels = this.options.log ? logTicks(low, high) : ticks(low, high, 5);
    const box = { left: 14 + 7 * Math.max(...labels.map(([, text]) => text.length)), top: 20, right: width - 12, bottom: height - 34 };
    const x = (v) => box.left + ((v - first) / reach) * (box.right - box.left);
    const part = (v) => (this.options.down ? high - v : v - low) / (high - low);
    const y = (v) => box.bottom - part(v) * (box.bottom - box.top);
    for (const [t, text] of labels) {
      svg.append(element("line", { class: "grid", x1: box.left, x2: box.right, y1: y(t), y2: y(t) }));
      svg.append(element("text", { x: box.left - 6, y: y(t) + 4, "text-anchor": "end" }, text));
    }
    for (const [t, text] of ticks(first, first + reach, Math.max(2, Math.floor(width / 90)))) {
      svg.append(element("line", { class: "grid", x1: x(t), x2: x(t), y1: box.bottom, y2: box.bottom + 4 }));
      svg.append(element("text", { x: x(t), y: box.bottom + 17, "text-anchor": "middle" }, text));
    }
    svg.append(element("text", { x: box.right, y: height - 2, "text-anchor": "end" }, this.options.x));
    svg.append(element("text", { x: 4, y: 11 }, this.options.y));
    if (this.options.mark !== undefined) {
      const at = x(this.options.mark);
      svg.append(element("line", { class: "mark", x1: at, x2: at, y1: box.top, y2: box.bottom }));
    }
    return [x, y, box.right - box.left];
  }

  path(line, x, y, width) {
    const group = Math.max(1, Math.floor(line.length / (2 * width)));
    let out = "", pen = "M";
    for (let i = 0; i < line.length; i += group) {
      let [least, most] = [i, i];
      for (let k = i; k < Math.min(i + group, line.length); k++) {
        if (!(line[k] >= line[least])) least = k;
        if (!(line[k] <= line[most])) most = k;
      }
      for (const k of least === most ? [least] : [Math.min(least, most), Math.max(least, most)]) {
        if (!Number.isFinite(line[k])) pen = "M";
        else (out += `${pen}${x(this.xs[k]).toFixed(1)} ${y(line[k]).toFixed(1)}`), (pen = "L");
      }
    }
    return line.length === 1 && out ? `${out}h1` : out;
  }
}

// Dots at (xs[i], ys[i]) in a box; options as above, and reach: [[low, high] of x, of y], down: y grows downwards.
class Scatter extends Plot {
  show(xs, ys, options) {
    Object.assign(this, { xs, ys, options });
    this.draw();
  }

  draw() {
    const width = this.place.clientWidth, height = this.place.clientHeight;
    if (!this.xs || !width || !height) return;
    const svg = element("svg", { viewBox: `0 0 ${width} ${height}`, "aria-hidden": "true" });
    this.place.replaceChildren(svg);
    const [across, up] = this.options.reach;
    const [x, y] = this.frame(svg, width, height, [across[0], across[1] - across[0]], up);
    const dots = Array.from(this.xs, (v, i) => `M${x(v).toFixed(1)} ${y(this.ys[i]).toFixed(1)}h0`);
    svg.append(element("path", { class: "dots", d: dots.join("") }));
  }
}
