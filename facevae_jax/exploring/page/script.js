// The page of `python -m facevae_jax.explore`. All state lives here and in the address: the server keeps none.

import { MAX_SEED, PHOTOGRAPH, readAddress, wholeNumber, writeAddress } from "./address.js";

const FACES = ["From", "To"];
const SETTLED_MS = 200; // after the last move of a slider: browsers limit how often an address may change
const element = (id) => document.getElementById(id);
// `source` is what the address says of a face: { seed, prior, temperature } or PHOTOGRAPH.
const slots = FACES.map(() => ({ latent: null, origin: "", thumbnail: "", serial: 0, source: null, photograph: null }));
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
  for (const { key, kind, label, score, weak } of page.sliders) {
    element(`${kind}s`).hidden = false;
    if (weak) element("weak").hidden = false;
    const group = element(weak ? "weak-sliders" : `${kind}-sliders`);
    const range = { low: -page.max_alpha, high: page.max_alpha, step: 0.1, text: signed };
    sliders.set(key, addSlider(group, { label, hint: score === null ? "" : `R² ${score.toFixed(2)}`, ...range }));
  }
  for (const { name, label } of page.priors) element("prior").append(new Option(label, name));
  temperature = addSlider(element("priors"), {
    label: "Temperature", high: page.max_temperature, step: 0.05, initial: 1, moves: false, text: (x) => x.toFixed(2),
  });
  element("reset").addEventListener("click", () => {
    for (const slider of [...sliders.values(), morph]) slider.set(0);
    remember("reset");
    update();
  });
  element("prior").addEventListener("change", () => remember("prior"));
  acceptDrops();
  addEventListener("popstate", () => restore().catch(report)); // Back, Forward, and an address that is edited
  await restore();
}

// The address

// What was changed last: moves of one slider that follow each other are one entry of the history.
let changed = "start", settling = 0, restored = 0;

function remember(what) {
  clearTimeout(settling);
  const [from, to] = slots.map((slot) => slot.source);
  const values = new Map([...sliders].map(([key, slider]) => [key, slider.value]));
  const others = { morph: morph.value, prior: element("prior").value, temperature: temperature.value };
  const address = writeAddress({ from, to, sliders: values, ...others });
  if (address === location.hash) return;
  history[what === changed ? "replaceState" : "pushState"](null, "", address);
  changed = what;
}

async function restore() {
  const serial = ++restored;
  clearTimeout(settling);
  const { state, wrong } = readAddress(location.hash, page);
  element("prior").value = state.prior;
  temperature.set(state.temperature);
  morph.set(state.morph);
  for (const [key, slider] of sliders) slider.set(state.sliders.get(key));
  element("weak").open ||= page.sliders.some(({ key, weak }) => weak && state.sliders.get(key));
  const remarks = wrong.length ? [`Not valid in the address, and left out: ${wrong.slice(0, 5).join(", ")}.`] : [];
  for (const [index, source] of [[1, state.to], [0, state.from]]) {
    remarks.push(await restoreFace(index, source));
    if (serial !== restored) return; // Back or Forward was pressed again
  }
  await update();
  if (serial !== restored) return;
  element("status").textContent = remarks.filter(Boolean).join(" ");
  changed = "start";
  remember("start"); // replaces the address by that of what is shown
}

// Resolves to a remark where the face is another than the address asks for.
async function restoreFace(index, source) {
  const slot = slots[index];
  ++slot.serial; // an answer that is still to come is out of date
  slot.card.removeAttribute("aria-busy");
  if (slot.latent && JSON.stringify(source) === JSON.stringify(slot.source)) return "";
  if (source === PHOTOGRAPH && slot.photograph) {
    show(index, slot.photograph, source);
    return "";
  }
  await sample(index, source && source !== PHOTOGRAPH ? source : drawn(randomSeed()));
  return source === PHOTOGRAPH ? `${FACES[index]} is a new face: addresses do not hold photographs.` : "";
}

// Controls

function addSlider(parent, { label, hint = "", low = 0, high, step, initial = 0, moves = true, text }) {
  const row = element("slider-template").content.cloneNode(true).firstElementChild;
  const [title, output, input] = row.children;
  const [name, note] = title.children;
  input.id = output.htmlFor = name.htmlFor = `slider-${document.querySelectorAll(".slider").length}`;
  name.textContent = label;
  note.textContent = hint;
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
  input.addEventListener("change", () => {
    clearTimeout(settling);
    settling = setTimeout(remember, SETTLED_MS, input.id);
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
  const seed = card.querySelector(".seed input");
  seed.setAttribute("aria-label", `Seed: ${title}`);
  seed.addEventListener("change", () => typedSeed(index, seed));
  seed.addEventListener("keydown", ({ key }) => { // the same seed again: prior or temperature may have changed
    if (key === "Enter" && seed.value === String(slots[index].source?.seed)) typedSeed(index, seed);
  });
  const input = card.querySelector("input[type=file]");
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
  choose(index, () => sample(index, drawn(randomSeed())));
}

function typedSeed(index, input) {
  const seed = wholeNumber(input.value.trim());
  if (seed === undefined) report(new Error(`A seed is a whole number from 0 to ${MAX_SEED}.`));
  else choose(index, () => sample(index, drawn(seed)));
}

function photograph(index, file) {
  const limit = page.max_photograph_bytes;
  if (file.size > limit) {
    report(new Error(`${file.name} is ${megabytes(file.size)} MB; the limit is ${megabytes(limit)} MB.`));
    return;
  }
  const reading = () => load(index, `photograph ${file.name}`, "/encode", file, PHOTOGRAPH);
  choose(index, reading, "Reading the photograph …");
}

// A face that the reader asks for: the picture moves to it, and the address with it.
async function choose(index, loading, busy = "") {
  element("status").textContent = busy;
  const note = await loading();
  if (note !== null) {
    morph.set(index);
    await update();
    remember(`face ${slots[index].serial}`); // an entry of the history for each
  }
  element("status").textContent = note ?? "";
}

function drawn(seed) {
  return { seed, prior: element("prior").value, temperature: temperature.value };
}

function randomSeed() {
  return crypto.getRandomValues(new Uint32Array(1))[0];
}

function sample(index, source) {
  return load(index, `sample with seed ${source.seed}`, "/sample", JSON.stringify(source), source);
}

// Fetches a face; resolves to a remark about it, or to null if it failed or a later choice has replaced it.
async function load(index, origin, path, body, source) {
  const slot = slots[index];
  const serial = ++slot.serial;
  slot.card.setAttribute("aria-busy", "true");
  try {
    const { latent, picture, note } = await (await post(path, body)).json();
    if (serial !== slot.serial) return null;
    const bytes = Uint8Array.from(atob(picture), (c) => c.charCodeAt(0));
    const face = { latent, origin, image: new Blob([bytes], { type: "image/png" }) };
    if (source === PHOTOGRAPH) slot.photograph = face; // for Back and Forward: the address cannot hold it
    show(index, face, source);
    element("problem").hidden = true;
    return note || "";
  } catch (error) {
    report(error);
    return null;
  } finally {
    if (serial === slot.serial) slot.card.removeAttribute("aria-busy");
  }
}

function show(index, { latent, origin, image }, source) {
  const slot = slots[index];
  Object.assign(slot, { latent, origin, source });
  URL.revokeObjectURL(slot.thumbnail);
  slot.thumbnail = URL.createObjectURL(image);
  Object.assign(slot.card.querySelector("img"), { src: slot.thumbnail, alt: `${FACES[index]}: ${origin}` });
  Object.assign(slot.card.querySelector(".origin"), { textContent: origin, title: origin });
  slot.card.querySelector(".seed input").value = source === PHOTOGRAPH ? "" : source.seed;
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
