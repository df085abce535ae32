// The page: every map over its layer, the profiles through the chosen point, the curves of the training.

const data = JSON.parse(document.getElementById("data").textContent);
const layers = Object.fromEntries(
  data.layers.map((about) => [about.name, new Layer(about, about.colours ? bytesOf(data.colours[about.colours]) : null)]),
);
const views = [...document.querySelectorAll("figure.view")].map(
  (figure) => new MapView(figure, layers[figure.dataset.layer], data.pitch, data.axes),
);

const main = views[0], field = layers.field;
const floats = (text) => new Float32Array(bytesOf(text).buffer);
const split = (all, length) => Array.from({ length: all.length / length }, (_, c) => all.subarray(c * length, (c + 1) * length));

// Where the numbers of an axis's px are, and what is written there.
function axisOf(name) {
  if (data.axes) return { ...data.axes[name], label: data.axes[name].name };
  const scale = data.pitch ? data.pitch * 1e-3 : 1;
  return { origin: 0.5 * scale, step: scale, from: 0, label: `${name} (${data.pitch ? "mm" : "px"})` };
}

function profileTitle(axis, other, through) {
  if (data.axes) return `Along ${data.axes[axis].name} at ${placeOn(data.axes[other], through)}`;
  return `${axis === "x" ? "Horizontal" : "Vertical"} profile at ${other} = ${through} px`;
}

function profiles() {
  const plots = { x: new Plot(document.getElementById("profile-x")), y: new Plot(document.getElementById("profile-y")) };
  const point = main.figure.querySelector("form.point");
  const size = { x: field.width, y: field.height };
  const given = (axis, k) => (data.axes ? Number((axis.origin + k * axis.step).toPrecision(6)) : k);
  const asked = (axis, value) => (data.axes ? Math.round((value - axis.origin) / axis.step) : value);

  // `lines`: per axis the channels' values along it, or those of a reference after them, through pixel (x, y).
  function show(x, y, lines) {
    for (const [name, other, through, at] of [["x", "y", y, x], ["y", "x", x, y]]) {
      const axis = axisOf(name);
      const xs = Float64Array.from(lines[name][0], (_, i) => axis.origin + i * axis.step);
      const options = { x: axis.label, y: field.unit, mark: axis.origin + at * axis.step, from: axis.from };
      plots[name].show(xs, lines[name], { ...options, dashed: Boolean(layers.reference) });
      document.getElementById(`profile-${name}-title`).textContent = profileTitle(name, other, through);
    }
    [point.elements.x.value, point.elements.y.value] = [given(axisOf("x"), x), given(axisOf("y"), y)];
    main.mark = [x, y];
    main.draw();
  }

  let latest = 0;
  async function choose(x, y) {
    const number = ++latest, shown = layers.reference ? [field, layers.reference] : [field];
    const [along, down] = await Promise.all(
      [["x", y], ["y", x]].map(async ([axis, at]) => (await Promise.all(shown.map((k) => k.line(axis, at)))).flat()),
    );
    if (number === latest) show(x, y, { x: along, y: down });
  }

  for (const view of views) view.chosen = choose;
  point.addEventListener("submit", (event) => {
    event.preventDefault();
    const [x, y] = ["x", "y"].map((name) => asked(axisOf(name), Number(point.elements[name].value)));
    choose(clamp(x, 0, size.x - 1), clamp(y, 0, size.y - 1));
  });
  // The first profiles were computed without any rounding.
  show(...data.profiles.at, { x: split(floats(data.profiles.x), size.x), y: split(floats(data.profiles.y), size.y) });
}
if (main) profiles();

const { step, ...curves } = data.curves;
for (const [name, values] of Object.entries(curves)) {
  const place = document.getElementById(`curve-${name}`), line = values.map((v) => v ?? NaN);
  const known = line.filter((v) => !Number.isNaN(v)), level = data.true?.[name];
  const spread = Math.min(...known) > 0 && Math.max(...known) > 10 * Math.min(...known);
  const log = spread && (name === "loss" || Boolean(data.axes)) && level === undefined;
  const shown = level === undefined ? [line] : [line, line.map(() => level)];
  if (place) new Plot(place).show(step, shown, { x: "step", y: "", log, dashed: true, mark: data.changed ?? undefined });
}
