// A canvas over one layer: move, zoom, read. Coordinates are px of the source, so all maps agree; `axes` says what they
// stand for where they are points of a lattice: the middle of px k is at origin + k * step.

const placeOn = (axis, k) => `${axis.name} = ${shown(Number((axis.origin + k * axis.step).toPrecision(6)))}`;
const clamp = (value, low, high) => Math.max(low, Math.min(high, value));

class MapView {
  constructor(figure, layer, pitch, axes) {
    this.figure = figure;
    this.layer = layer;
    this.pitch = pitch;
    this.axes = axes;
    this.canvas = figure.querySelector("canvas.map");
    this.output = figure.querySelector("output");
    this.mark = null; // [x, y] of the profiles
    this.chosen = () => {};
    this.pointers = new Map();
    this.home();
    new ResizeObserver(() => this.resize()).observe(this.canvas);
    this.listen();
    this.bar();
  }

  home() {
    this.whole = true;
    this.centre = [this.layer.width / 2, this.layer.height / 2];
    this.draw();
  }

  resize() {
    const ratio = window.devicePixelRatio || 1;
    this.canvas.width = Math.round(this.canvas.clientWidth * ratio);
    this.canvas.height = Math.round(this.canvas.clientHeight * ratio);
    this.draw();
  }

  // Device pixels per px of the source at which all of it is seen.
  get least() {
    return Math.min(this.canvas.width / this.layer.width, this.canvas.height / this.layer.height);
  }

  toSource(event) {
    const box = this.canvas.getBoundingClientRect(), ratio = this.canvas.width / box.width;
    return this.sourceOf((event.clientX - box.left) * ratio, (event.clientY - box.top) * ratio);
  }

  sourceOf(x, y) {
    return [
      this.centre[0] + (x - this.canvas.width / 2) / this.zoom,
      this.centre[1] + (y - this.canvas.height / 2) / this.zoom,
    ];
  }

  zoomBy(factor, [x, y] = this.centre) {
    const zoom = clamp(this.zoom * factor, this.least, Math.max(40, this.least));
    const change = this.zoom / zoom;
    this.whole = zoom <= this.least;
    this.zoom = zoom;
    this.moveTo([x + (this.centre[0] - x) * change, y + (this.centre[1] - y) * change]);
  }

  // Keeps the map in sight: an axis that fits is centred, of another no empty border is shown.
  moveTo([x, y]) {
    const keep = (value, length, seen) =>
      seen >= length ? length / 2 : clamp(value, seen / 2, length - seen / 2);
    this.centre = [
      keep(x, this.layer.width, this.canvas.width / this.zoom),
      keep(y, this.layer.height, this.canvas.height / this.zoom),
    ];
    this.draw();
  }

  draw() {
    if (this.drawing) return;
    this.drawing = requestAnimationFrame(() => {
      this.drawing = null;
      if (this.canvas.width && this.canvas.height) this.paint();
    });
  }

  paint() {
    const { canvas, layer } = this;
    if (this.whole) this.zoom = this.least;
    const context = canvas.getContext("2d");
    context.clearRect(0, 0, canvas.width, canvas.height);
    const last = layer.levels.length - 1;
    const level = clamp(Math.round(-Math.log2(this.zoom * layer.scale)), 0, last);
    const [left, top] = [0, 0].map((_, a) => [canvas.width, canvas.height][a] / 2 - this.centre[a] * this.zoom);
    context.save();
    context.beginPath();
    context.rect(Math.round(left), Math.round(top), Math.round(layer.width * this.zoom), Math.round(layer.height * this.zoom));
    context.clip();
    let missing = level < last ? this.paintLevel(context, last, left, top) : 0; // a blurred ground until the rest is there
    missing += this.paintLevel(context, level, left, top);
    context.restore();
    if (this.mark) this.cross(context, left, top);
    if (this.axes) this.rules();
    canvas.dataset.level = level;
    canvas.dataset.missing = missing;
    canvas.dataset.zoom = this.zoom;
  }

  paintLevel(context, level, left, top) {
    const { canvas, layer } = this;
    const [height, width] = layer.levels[level];
    const pixel = this.zoom * layer.scale * 2 ** level, side = TILE * pixel; // device pixels
    context.imageSmoothingEnabled = pixel < 1.5 || level > 0;
    let missing = 0;
    const columns = Math.ceil(width / TILE), rows = Math.ceil(height / TILE);
    for (let row = Math.max(0, Math.floor(-top / side)); row < rows && top + row * side < canvas.height; row++) {
      for (let column = Math.max(0, Math.floor(-left / side)); column < columns && left + column * side < canvas.width; column++) {
        const tile = layer.get(level, row, column, () => this.draw());
        if (!tile) {
          missing++;
          continue;
        }
        const x0 = Math.round(left + column * side), y0 = Math.round(top + row * side);
        const x1 = Math.round(left + column * side + tile.width * pixel), y1 = Math.round(top + row * side + tile.height * pixel);
        context.drawImage(layer.painted(tile), x0, y0, x1 - x0, y1 - y0);
      }
    }
    return missing;
  }

  cross(context, left, top) {
    const x = left + (this.mark[0] + 0.5) * this.zoom, y = top + (this.mark[1] + 0.5) * this.zoom;
    const ratio = window.devicePixelRatio || 1;
    for (const [colour, width] of [["rgba(0,0,0,.55)", 3], ["#fff", 1]]) {
      context.strokeStyle = colour;
      context.lineWidth = width * ratio;
      context.beginPath();
      context.moveTo(x, 0);
      context.lineTo(x, this.canvas.height);
      context.moveTo(0, y);
      context.lineTo(this.canvas.width, y);
      context.stroke();
    }
  }

  // Numbers beside the canvas, at the places of what is seen.
  rules() {
    const ends = [this.sourceOf(0, 0), this.sourceOf(this.canvas.width, this.canvas.height)];
    for (const [place, k, axis] of [["across", 0, this.axes.x], ["down", 1, this.axes.y]]) {
      const [low, high] = ends.map((end) => axis.origin + (end[k] - 0.5) * axis.step);
      const marks = ticks(low, high, 8).map(([value, text]) => {
        const mark = Object.assign(document.createElement("span"), { textContent: text });
        mark.style[k ? "top" : "left"] = `${(100 * (value - low)) / (high - low)}%`;
        return mark;
      });
      const name = Object.assign(document.createElement("b"), { textContent: axis.name });
      this.figure.querySelector(`.rule.${place}`).replaceChildren(name, ...marks);
    }
  }

  pixelAt([x, y]) {
    return x >= 0 && y >= 0 && x < this.layer.width && y < this.layer.height ? [Math.floor(x), Math.floor(y)] : null;
  }

  async read(point) {
    const pixel = this.pixelAt(point);
    this.reading = pixel && pixel.join();
    if (!pixel) return;
    const values = await this.layer.at(...pixel);
    if (this.reading !== pixel.join()) return; // the cursor has moved on
    const known = values.some((value) => !Number.isNaN(value));
    const said = known ? `${values.map((v) => shown(v)).join(" ")} ${this.layer.unit}` : "no value";
    const where = this.pitch ? `, ${pixel.map((v) => shown((v + 0.5) * this.pitch * 1e-3)).join(" × ")} mm` : "";
    this.output.textContent = this.axes
      ? `${placeOn(this.axes.y, pixel[1])}, ${placeOn(this.axes.x, pixel[0])}: ${said}`
      : `x ${pixel[0]}, y ${pixel[1]} px${where}: ${said}`;
  }

  choose(point) {
    const pixel = this.pixelAt(point);
    if (pixel) this.chosen(...pixel);
  }

  bar() {
    const canvas = this.figure.querySelector(".bar canvas");
    if (!canvas) return;
    canvas.width = 256;
    canvas.height = 1;
    const context = canvas.getContext("2d"), image = context.createImageData(256, 1);
    for (let i = 0; i < 256; i++) image.data.set([...this.layer.table.slice(3 * i, 3 * i + 3), 255], 4 * i);
    context.putImageData(image, 0, 0);
    const { low, high, unit } = this.layer;
    const ticks = [0, 0.25, 0.5, 0.75, 1].map((part) => Object.assign(document.createElement("span"), {
      textContent: `${shown(low + part * (high - low), high - low)}${part === 1 && unit ? ` ${unit}` : ""}`,
    }));
    this.figure.querySelector(".ticks").replaceChildren(...ticks);
  }

  // The colours from the 1st to the 99th percentile of what is seen.
  fit() {
    const { layer, canvas } = this, seen = [];
    const level = Number(canvas.dataset.level), pixel = layer.scale * 2 ** level;
    const [x0, y0] = this.sourceOf(0, 0), [x1, y1] = this.sourceOf(canvas.width, canvas.height);
    for (const [name, tile] of layer.tiles) {
      const [of, row, column] = name.split("-").slice(-3).map(Number);
      if (of !== level) continue;
      for (let i = 0; i < tile.planes[0].length; i++) {
        const x = (column * TILE + (i % tile.width)) * pixel, y = (row * TILE + Math.floor(i / tile.width)) * pixel;
        const value = tile.planes[0][i];
        if (x >= x0 && x < x1 && y >= y0 && y < y1 && !Number.isNaN(value)) seen.push(value);
      }
    }
    if (!seen.length) return;
    const sorted = Float32Array.from(seen).sort();
    layer.low = sorted[Math.floor(0.01 * (sorted.length - 1))];
    layer.high = sorted[Math.ceil(0.99 * (sorted.length - 1))];
    if (!(layer.high > layer.low)) layer.high = layer.low + (Math.abs(layer.low) || 1) * 1e-6;
    this.bar();
    this.draw();
  }

  listen() {
    const { canvas } = this;
    canvas.addEventListener("wheel", (event) => {
      event.preventDefault();
      this.zoomBy(2 ** (-event.deltaY * (event.deltaMode ? 20 : 1) / 300), this.toSource(event));
    }, { passive: false });
    canvas.addEventListener("pointerdown", (event) => {
      canvas.setPointerCapture(event.pointerId);
      if (!this.pointers.size) this.moved = false;
      this.pointers.set(event.pointerId, [event.clientX, event.clientY]);
      this.start = [event.clientX, event.clientY];
      if (this.pointers.size > 1) this.moved = true;
    });
    canvas.addEventListener("pointermove", (event) => this.pointerMoved(event));
    canvas.addEventListener("pointerup", (event) => {
      if (this.pointers.has(event.pointerId) && !this.moved) this.choose(this.toSource(event));
      this.pointers.delete(event.pointerId);
    });
    canvas.addEventListener("pointercancel", (event) => this.pointers.delete(event.pointerId));
    canvas.addEventListener("keydown", (event) => this.key(event));
    this.figure.querySelector(".tools").addEventListener("click", (event) => {
      const actions = { in: () => this.zoomBy(2), out: () => this.zoomBy(0.5), whole: () => this.home(), fit: () => this.fit() };
      actions[event.target.dataset?.do]?.();
    });
  }

  pointerMoved(event) {
    const last = this.pointers.get(event.pointerId);
    if (!last) return void this.read(this.toSource(event));
    const ratio = this.canvas.width / this.canvas.clientWidth, now = [event.clientX, event.clientY];
    if (Math.hypot(now[0] - this.start[0], now[1] - this.start[1]) > 4) this.moved = true;
    const others = [...this.pointers].filter(([id]) => id !== event.pointerId).map(([, place]) => place);
    this.pointers.set(event.pointerId, now);
    if (!this.moved) return;
    const shift = [0, 1].map((a) => ((now[a] - last[a]) * ratio) / (others.length ? 2 : 1) / this.zoom);
    this.moveTo([this.centre[0] - shift[0], this.centre[1] - shift[1]]);
    if (!others.length) return;
    const [other] = others, span = (place) => Math.max(Math.hypot(place[0] - other[0], place[1] - other[1]), 1);
    const middle = { clientX: (now[0] + other[0]) / 2, clientY: (now[1] + other[1]) / 2 };
    this.zoomBy(span(now) / span(last), this.toSource(middle));
  }

  key(event) {
    const far = [this.canvas.width, this.canvas.height].map((n) => n / 8 / this.zoom), [x, y] = this.centre;
    const actions = {
      ArrowLeft: () => this.moveTo([x - far[0], y]), ArrowRight: () => this.moveTo([x + far[0], y]),
      ArrowUp: () => this.moveTo([x, y - far[1]]), ArrowDown: () => this.moveTo([x, y + far[1]]),
      "+": () => this.zoomBy(2), "=": () => this.zoomBy(2), "-": () => this.zoomBy(0.5),
      0: () => this.home(), Home: () => this.home(), Enter: () => this.choose(this.centre),
    };
    if (!actions[event.key] || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    actions[event.key]();
    this.read(this.centre);
  }
}
