// What the page shows, as the fragment of its address and back. Anyone may write an address: every value is checked.

export const MAX_SEED = 2 ** 32 - 1;
export const PHOTOGRAPH = "photograph"; // stands for a face that no address can hold

export function writeAddress({ from, to, morph, prior, temperature, sliders }) {
  const fields = new URLSearchParams();
  for (const [name, source] of Object.entries({ from, to })) {
    if (source === PHOTOGRAPH) fields.set(name, PHOTOGRAPH);
    else if (source) fields.set(name, `${source.seed},${source.prior},${source.temperature}`);
  }
  if (morph) fields.set("morph", morph);
  fields.set("prior", prior);
  fields.set("temperature", temperature);
  for (const [key, value] of sliders) if (value) fields.set(key, value);
  return "#" + fields.toString().replaceAll("%2C", ",").replaceAll("%3A", ":");
}

// The state that an address describes, with defaults for what it leaves out, and the names of values that are not valid.
export function readAddress(fragment, page) {
  const fields = new URLSearchParams(fragment.slice(1));
  const wrong = [];
  const read = (name, check, otherwise) => {
    const text = fields.get(name);
    fields.delete(name);
    if (text === null) return otherwise;
    const value = check(text);
    if (value === undefined) wrong.push(name);
    return value ?? otherwise;
  };
  const priors = page.priors.map(({ name }) => name);
  const prior = (text) => (priors.includes(text) ? text : undefined);
  const temperature = (text) => number(text, 0, page.max_temperature);
  const face = (text) => {
    if (text === PHOTOGRAPH) return text;
    const [seed, of, at, ...rest] = text.split(",");
    const source = { seed: wholeNumber(seed), prior: prior(of), temperature: temperature(at ?? "") };
    return rest.length || Object.values(source).includes(undefined) ? undefined : source;
  };
  const state = {
    from: read("from", face, null),
    to: read("to", face, null),
    morph: read("morph", (text) => number(text, 0, 1), 0),
    prior: read("prior", prior, priors[0]),
    temperature: read("temperature", temperature, 1),
    sliders: new Map(),
  };
  for (const { key } of page.sliders) {
    state.sliders.set(key, read(key, (text) => number(text, -page.max_alpha, page.max_alpha), 0));
  }
  const unknown = [...fields.keys()].map((name) => name.slice(0, 40));
  return { state, wrong: [...wrong, ...unknown] };
}

// The seed that a text is; undefined if it is none.
export function wholeNumber(text) {
  return /^\d{1,10}$/.test(text) && Number(text) <= MAX_SEED ? Number(text) : undefined;
}

function number(text, low, high) {
  const value = /^-?\d{1,3}(\.\d{1,4})?$/.test(text) ? Number(text) : NaN;
  return low <= value && value <= high ? value : undefined;
}
