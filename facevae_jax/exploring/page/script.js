// The page of `python -m facevae_jax.explore`. All state lives here: the server keeps none.

const FACES = ["From", "To"];
const element = (id) => document.getElementById(id);
const slots = FACES.map(() => ({ latent: null, origin: "", thumbnail: "", serial: 0 }));
const sliders = new Map(); // by key: attributes and dimensions
let page, morph, temperature;

start().catch(report);

async function start() {
  page = await (await fetch("/page.json")).json();
  element("about").textContent =
    `${page.name ? page.name + ", " : ""}step ${page.step.toLocaleString("en")}, ` +
    `${page.resolution}×${page.resolution} pixels, ${page.code_size} latent dimensions`;
  FACES.forEach(addFace);
  morph = addSlider(element("morph"), { label: "Morph", high: 1, step: 0.01, text: (x) => `${Math.round(100 * x)}%` });
  for (const { key, kind, label } of page.sliders) {
    const group = element(`${kind}s`);
    group.hidden = false;
    const range = { low: -page.max_alpha, high: page.max_alpha, step: 0.1, text: signed };
    sliders.set(key, addSlider(group, { label, ...range }));
  }
  for (const { name, label } of page.priors) element("prior").append(new Option(label, name));
  temperature = addSlider(element("priors"), {
    label: "Temperature", high: page.max_temperature, step: 0.05, initial: 1, moves: false, text: (x) => x.toFixed(2),
  });
  element("reset").addEventListener("click", () => {
    for (const slider of [...sliders.values(), morph]) slider.set(0);
    update();
  });
  acceptDrops();
  for (const index of [1, 0]) await newFace(index);
}

// Controls

function addSlider(parent, { label, low = 0, high, step, initial = 0, moves = true, text }) {
  const row = element("slider-template").content.cloneNode(true).firstElementChild;
  const [name, output, input] = row.children;
  input.id = output.htmlFor = name.htmlFor = `slider-${document.querySelectorAll(".slider").length}`;
  name.textContent = label;
  Object.assign(input, { min: low, max: high, step, value: initial });
  const show = () => {
    output.value = text(Number(input.value));
    input.setAttribute("aria-valuetext", output.value);
    const [zero, at] = [0, Number(input.value)].map((x) => (x - low) / (high - low));
    input.style.setProperty("--from", zero ? Math.min(zero, at) : -1); // -1: also fills the rounded end of the track
    input.style.setProperty("--to", Math.max(zero, at));
    row.classList.toggle("moved", Number(input.value) !== initial);
  };
  input.addEventListener("input", () => {
    show();
    if (moves) update();
  });
  show();
  parent.append(row);
  return {
    label,
    get value() { return Number(input.value); },
    get text() { return output.value; },
    set(value) { input.value = value; show(); },
  };
}

function addFace(title, index) {
  const card = element("face-template").content.cloneNode(true).firstElementChild;
  card.dataset.index = index;
  card.querySelector("h2").textContent = title;
  card.querySelector("button").setAttribute("aria-label", `New face: ${title}`);
  card.querySelector("button").addEventListener("click", () => newFace(index));
  const input = card.querySelector("input");
  input.setAttribute("aria-label", `Photograph: ${title}`);
  input.addEventListener("change", () => {
    if (input.files.length) photograph(index, input.files[0]);
    input.value = ""; // so the same file can be chosen again
  });
  element("faces").append(card);
  slots[index].card = card;
}

function acceptDrops() {
  const target = (event) => event.target.closest?.(".face") ?? slots[0].card;
  const mark = (card) => slots.forEach((slot) => slot.card.classList.toggle("target", slot.card === card));
  const stop = () => { document.body.classList.remove("dragging"); mark(null); };
  addEventListener("dragover", (event) => {
    event.preventDefault(); // or the browser opens the photograph instead of the page
    document.body.classList.add("dragging");
    mark(target(event));
  });
  addEventListener("dragleave", (event) => { if (!event.relatedTarget) stop(); });
  addEventListener("drop", (event) => {
    event.preventDefault();
    stop();
    const file = event.dataTransfer.files[0];
    if (file) photograph(Number(target(event).dataset.index), file);
    else report(new Error("Not a file: save the picture first, then drop the file here."));
  });
}

// Faces

function newFace(index) {
  const seed = crypto.getRandomValues(new Uint32Array(1))[0];
  const request = { prior: element("prior").value, temperature: temperature.value, seed };
  return load(index, `sample with seed ${seed}`, "/sample", JSON.stringify(request));
}

async function photograph(index, file) {
  const limit = page.max_photograph_bytes;
  if (file.size > limit) {
    report(new Error(`${file.name} is ${megabytes(file.size)} MB; the limit is ${megabytes(limit)} MB.`));
    return;
  }
  await load(index, `photograph ${file.name}`, "/encode", file);
}

async function load(index, origin, path, body) {
  const slot = slots[index];
  const serial = ++slot.serial;
  slot.card.setAttribute("aria-busy", "true");
  let remark = "";
  element("status").textContent = path === "/encode" ? "Reading the photograph …" : "";
  try {
    const { latent, picture, note } = await (await post(path, body)).json();
    if (serial !== slot.serial) return; // a later choice has replaced this one
    Object.assign(slot, { latent, origin });
    const bytes = Uint8Array.from(atob(picture), (c) => c.charCodeAt(0));
    URL.revokeObjectURL(slot.thumbnail);
    slot.thumbnail = URL.createObjectURL(new Blob([bytes], { type: "image/png" }));
    const image = slot.card.querySelector("img");
    Object.assign(image, { src: slot.thumbnail, alt: `${FACES[index]}: ${origin}` });
    Object.assign(slot.card.querySelector(".origin"), { textContent: origin, title: origin });
    morph.set(index); // show the face just chosen
    element("problem").hidden = true;
    await update();
    remark = note || "";
  } catch (error) {
    report(error);
  } finally {
    if (serial === slot.serial) slot.card.removeAttribute("aria-busy");
    element("status").textContent = remark;
  }
}

// The picture

let asked = false, running = null;

// One request at a time, always for the latest state: sliders move faster than any server answers.
function update() {
  asked = true;
  running ??= (async () => {
    try {
      while (asked) {
        asked = false;
        await render();
      }
    } catch (error) {
      report(error);
    } finally {
      running = null;
    }
  })();
  return running;
}

async function render() {
  const latents = slots.map((slot) => slot.latent).filter(Boolean);
  if (!latents.length) return;
  const moved = [...sliders].filter(([, slider]) => slider.value);
  const text = caption(moved.map(([, slider]) => slider));
  const alphas = Object.fromEntries(moved.map(([key, slider]) => [key, slider.value]));
  const scene = { faces: latents, weight: morph.value, alphas };
  const url = URL.createObjectURL(await (await post("/render", JSON.stringify(scene))).blob());
  const before = element("picture"), picture = before.cloneNode();
  Object.assign(picture, { src: url, alt: `Face: ${text}` });
  await picture.decode(); // before it replaces the old one: an image may appear empty while it loads
  before.replaceWith(picture);
  element("caption").textContent = text;
  element("problem").hidden = true;
  Object.assign(element("download"), { href: url, download: "face.png" }).removeAttribute("aria-disabled");
  URL.revokeObjectURL(before.src);
}

function caption(moved) {
  const [from, to] = slots;
  const path = `${morph.text} from ${from.origin} to ${to.origin}`;
  const face = !to.latent || morph.value === 0 ? from.origin : morph.value === 1 ? to.origin : path;
  return [face, ...moved.map((slider) => `${slider.label} ${slider.text}`)].join("; ");
}

// Requests and errors

async function post(path, body) {
  let response;
  try {
    response = await fetch(path, { method: "POST", body });
  } catch {
    throw new Error("The server does not answer: is the command still running?");
  }
  if (response.ok) return response;
  const { error } = await response.json().catch(() => ({ error: `error ${response.status}` }));
  throw new Error(error[0].toUpperCase() + error.slice(1));
}

function report(error) {
  element("problem").textContent = error.message;
  element("problem").hidden = false;
}

function signed(x) {
  return (x > 0 ? "+" : x < 0 ? "−" : "") + Math.abs(x).toFixed(1);
}

function megabytes(bytes) {
  return (bytes / 2 ** 20).toFixed(1).replace(/\.0$/, "");
}
