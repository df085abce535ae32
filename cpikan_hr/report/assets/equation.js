// What only an equation's page has: a line, the solution in time, and its collocation points.

if (data.lines) {
  const lines = Object.fromEntries(Object.entries(data.lines).map(([name, text]) => [name, floats(text)]));
  const axis = axisOf("x"), xs = Float64Array.from(lines.field, (_, i) => axis.origin + i * axis.step);
  const shown = { field: lines.reference ? [lines.field, lines.reference] : [lines.field], error: [lines.error], residual: [lines.residual] };
  for (const [name, values] of Object.entries(shown)) {
    const place = document.getElementById(`line-${name}`);
    if (place) new Plot(place).show(xs, values, { x: axis.name, y: "", dashed: true });
  }
}

// Columns of the map are times: its slices, and the one that the slider chooses.
async function inTime() {
  const known = layers.reference ? [field, layers.reference] : [field], space = axisOf("y");
  const xs = Float64Array.from({ length: field.height }, (_, i) => space.origin + i * space.step);
  const options = { x: space.label, y: "", dashed: true, range: data.range };
  const at = async (column) => (await Promise.all(known.map((layer) => layer.line("y", column)))).flat();
  const said = (column) => placeOn(data.axes.x, column);
  data.times.forEach(async (column, k) => {
    document.getElementById(`slice-${k}-title`).textContent = said(column);
    new Plot(document.getElementById(`slice-${k}`)).show(xs, await at(column), options);
  });
  const plot = new Plot(document.getElementById("animation")), slider = document.getElementById("time");
  const button = document.getElementById("play"), last = Number(slider.max);
  let latest = 0, running = false, began = 0;

  async function show() {
    const number = ++latest, column = Number(slider.value), lines = await at(column);
    slider.setAttribute("aria-valuetext", said(column));
    document.getElementById("time-said").textContent = said(column);
    if (number === latest) plot.show(xs, lines, options);
  }

  const LASTS = 5000; // ms, from the first time to the last
  function run(now) {
    if (!running) return;
    const column = Math.min(last, Math.floor(((now - began) / LASTS) * last));
    if (column !== Number(slider.value)) (slider.value = column), show();
    if (column < last) requestAnimationFrame(run);
    else play(false);
  }

  function play(on) {
    running = on;
    button.textContent = on ? "Pause" : "Play";
    button.setAttribute("aria-pressed", String(on));
    if (!on) return;
    if (Number(slider.value) === last) slider.value = 0;
    began = performance.now() - (Number(slider.value) / last) * LASTS;
    requestAnimationFrame(run);
  }

  button.addEventListener("click", () => play(!running));
  slider.addEventListener("input", () => (play(false), show()));
  await show();
}
if (data.times.length) inTime();

if (data.points.length) {
  const plot = new Scatter(document.getElementById("points-plot")), choice = document.getElementById("points-set");
  const reach = (name) => [data.axes[name].origin, data.axes[name].end];
  const show = () => {
    const set = data.points[Number(choice.value)], xs = floats(set.x);
    document.getElementById("points-plot-title").textContent = set.name;
    if (set.y) plot.show(xs, floats(set.y), { x: data.axes.x.name, y: data.axes.y.name, down: true, reach: [reach("x"), reach("y")] });
    else plot.show(xs, spread(xs), { x: data.axes.x.name, y: "points so far", reach: [reach("x"), [0, xs.length]] });
  };
  // Of a line: how many points lie to the left of each, so that a steep rise is where they are many.
  const spread = (xs) => {
    const order = Array.from(xs, (_, i) => i).sort((a, b) => xs[a] - xs[b]), ranks = new Float32Array(xs.length);
    order.forEach((i, rank) => (ranks[i] = rank + 1));
    return ranks;
  };
  choice.addEventListener("change", show);
  show();
}
