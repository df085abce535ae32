// The page: every map over its layer, the profiles through the chosen point, the curves of the training.

const data = JSON.parse(document.getElementById("data").textContent);
const layers = Object.fromEntries(
  data.layers.map((about) => [about.name, new Layer(about, about.colours ? bytesOf(data.colours[about.colours]) : null)]),
);
const views = [...document.querySelectorAll("figure.view")].map(
  (figure) => new MapView(figure, layers[figure.dataset.layer], data.pitch),
);

const main = views[0], field = layers.field;
const plots = { x: new Plot(document.getElementById("profile-x")), y: new Plot(document.getElementById("profile-y")) };
const point = main.figure.querySelector("form.point");

// `lines`: per axis the channels' values along it, through pixel (x, y).
function showProfiles(x, y, lines) {
  const scale = data.pitch ? data.pitch * 1e-3 : 1, unit = data.pitch ? "mm" : "px";
  for (const [axis, other, through, at] of [["x", "y", y, x], ["y", "x", x, y]]) {
    const xs = Float64Array.from(lines[axis][0], (_, i) => (i + 0.5) * scale);
    plots[axis].show(xs, lines[axis], { x: `${axis} (${unit})`, y: field.unit, mark: (at + 0.5) * scale, from: 0 });
    const title = axis === "x" ? "Horizontal" : "Vertical";
    document.getElementById(`profile-${axis}-title`).textContent = `${title} profile at ${other} = ${through} px`;
  }
  [point.elements.x.value, point.elements.y.value] = [x, y];
  main.mark = [x, y];
  main.draw();
}

let asked = 0;
async function choose(x, y) {
  const number = ++asked;
  const [along, down] = await Promise.all([field.line("x", y), field.line("y", x)]);
  if (number === asked) showProfiles(x, y, { x: along, y: down });
}

for (const view of views) view.chosen = choose;
point.addEventListener("submit", (event) => {
  event.preventDefault();
  choose(Number(point.elements.x.value), Number(point.elements.y.value));
});

// The first profiles were computed without any rounding.
const floats = (text) => new Float32Array(bytesOf(text).buffer);
const split = (all, length) => Array.from({ length: all.length / length }, (_, c) => all.subarray(c * length, (c + 1) * length));
showProfiles(...data.profiles.at, { x: split(floats(data.profiles.x), field.width), y: split(floats(data.profiles.y), field.height) });

const { step, ...curves } = data.curves;
for (const [name, values] of Object.entries(curves)) {
  const log = name === "loss" && Math.min(...values) > 0 && Math.max(...values) > 10 * Math.min(...values);
  const line = values.map((v) => v ?? NaN);
  new Plot(document.getElementById(`curve-${name}`)).show(step, [line], { x: "step", y: "", log });
}
