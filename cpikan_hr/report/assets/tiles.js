// Tiles of a layer: decoded on demand from the page's own inert elements, and coloured.

const TILE = 256;
const KEPT = 160; // decoded tiles of a layer that stay in memory

const bytesOf = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));

async function inflate(bytes) {
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

// The inverse of MapTiles: byte planes, folded signs, second differences, then value = low + (code - 1) * step.
async function decodeMap(element, width, height) {
  const planes = await inflate(bytesOf(element.textContent));
  const count = width * height;
  const codes = new Uint16Array(count);
  const low = Number(element.dataset.low), step = Number(element.dataset.step);
  const values = new Float32Array(count);
  for (let y = 0, i = 0; y < height; y++) {
    let difference = 0;
    for (let x = 0; x < width; x++, i++) {
      const folded = planes[i] | (planes[count + i] << 8);
      difference = (difference + ((folded >>> 1) ^ -(folded & 1))) & 0xffff;
      codes[i] = difference + (y ? codes[i - width] : 0);
      values[i] = codes[i] ? low + (codes[i] - 1) * step : NaN;
    }
  }
  return [values];
}

function newCanvas(width, height) {
  const canvas = document.createElement("canvas");
  canvas.width = width;
  canvas.height = height;
  return canvas;
}

async function decodePicture(element, canvas, full) {
  const bitmap = await createImageBitmap(new Blob([bytesOf(element.textContent)], { type: "image/webp" }));
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.drawImage(bitmap, 0, 0);
  const pixels = context.getImageData(0, 0, canvas.width, canvas.height).data;
  return [0, 1, 2].map((c) => Float32Array.from({ length: pixels.length / 4 }, (_, i) => (pixels[4 * i + c] * full) / 255));
}

class Layer {
  constructor(about, table) {
    Object.assign(this, about);
    this.table = table; // 256 colours, three bytes each
    this.tiles = new Map(); // by name, the longest unused first
    this.coming = new Map();
  }

  size(level, row, column) {
    const [height, width] = this.levels[level];
    return [Math.min(TILE, width - column * TILE), Math.min(TILE, height - row * TILE)];
  }

  // The tile if it is decoded; asks for it otherwise, and `then` is called once it is there.
  get(level, row, column, then) {
    const name = `${this.name}-${level}-${row}-${column}`;
    const tile = this.tiles.get(name);
    if (tile) {
      this.tiles.delete(name);
      this.tiles.set(name, tile);
      return tile;
    }
    this.load(name, level, row, column).then(then);
    return null;
  }

  load(name, level, row, column) {
    if (this.tiles.has(name)) return Promise.resolve(this.tiles.get(name));
    if (!this.coming.has(name)) {
      const decoded = this.decode(document.getElementById(name), ...this.size(level, row, column)).then((tile) => {
        this.coming.delete(name);
        this.tiles.set(name, tile);
        while (this.tiles.size > KEPT) this.tiles.delete(this.tiles.keys().next().value);
        return tile;
      });
      this.coming.set(name, decoded);
    }
    return this.coming.get(name);
  }

  async decode(element, width, height) {
    const tile = { width, height, canvas: newCanvas(width, height), stamp: null };
    if (this.kind === "picture") tile.planes = await decodePicture(element, tile.canvas, this.full);
    else tile.planes = await decodeMap(element, width, height);
    return tile;
  }

  // The tile's canvas in the present colours.
  painted(tile) {
    const stamp = `${this.low} ${this.high}`;
    if (this.kind === "picture" || tile.stamp === stamp) return tile.canvas;
    const context = tile.canvas.getContext("2d");
    const image = context.createImageData(tile.width, tile.height);
    const scale = 255 / (this.high - this.low);
    tile.planes[0].forEach((value, i) => {
      if (Number.isNaN(value)) return; // stays transparent
      const colour = 3 * Math.max(0, Math.min(255, Math.round((value - this.low) * scale)));
      image.data.set([this.table[colour], this.table[colour + 1], this.table[colour + 2], 255], 4 * i);
    });
    context.putImageData(image, 0, 0);
    tile.stamp = stamp;
    return tile.canvas;
  }

  // Values of each channel at a pixel of the source.
  async at(x, y) {
    const column = Math.floor(x / this.scale), row = Math.floor(y / this.scale);
    const place = [0, Math.floor(row / TILE), Math.floor(column / TILE)];
    const tile = await this.load([this.name, ...place].join("-"), ...place);
    const i = (row % TILE) * tile.width + (column % TILE);
    return this.channels(tile).map((plane) => plane[i]);
  }

  channels(tile) {
    return this.kind === "picture" && this.grey(tile) ? tile.planes.slice(0, 1) : tile.planes;
  }

  grey(tile) {
    tile.isGrey ??= tile.planes[0].every((value, i) => value === tile.planes[1][i] && value === tile.planes[2][i]);
    return tile.isGrey;
  }

  // The finest level's row (axis "x") or column ("y") through pixel number `index`, per channel.
  async line(axis, index) {
    const [height, width] = this.levels[0];
    const length = axis === "x" ? width : height;
    const across = Math.floor(index / TILE), within = index % TILE;
    const parts = Array.from({ length: Math.ceil(length / TILE) }, (_, k) => {
      const place = axis === "x" ? [0, across, k] : [0, k, across];
      return this.load([this.name, ...place].join("-"), ...place);
    });
    const tiles = await Promise.all(parts);
    const alike = tiles.every((tile) => this.channels(tile).length === 1);
    return (alike ? [0] : [0, 1, 2]).map((c) => {
      const out = new Float32Array(length);
      tiles.forEach((tile, k) => {
        const plane = tile.planes[c];
        if (axis === "x") out.set(plane.subarray(within * tile.width, (within + 1) * tile.width), k * TILE);
        else for (let y = 0; y < tile.height; y++) out[k * TILE + y] = plane[y * tile.width + within];
      });
      return out;
    });
  }
}
