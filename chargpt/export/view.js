"use strict";
// What is seen and clicked. The network is in a worker, so that none of this ever waits for it.

const $ = (id) => document.getElementById(id);
const DATA = JSON.parse($("data").textContent);
const VOCABULARY = new Vocabulary(DATA.vocabulary, DATA.stand_ins);
const BARS = 10; // characters shown as bars
const MOST_BITS = 8; // the surprise at which the color is full
const MOST_READ = 20_000; // characters of a text to read; what its attention needs is kept in memory

// ---- the worker ----

const program = ["kernel", "network"].map((id) => $(id).textContent).join("\n");
const worker = new Worker(URL.createObjectURL(new Blob([program], { type: "text/javascript" })));
let last_job = 0;

function ask(type, message = {}) {
  last_job += 1;
  worker.postMessage({ type, job: last_job, ...message });
  return last_job;
}

worker.onmessage = ({ data }) => answers[data.type](data);
worker.onerror = (event) => problem(`The network could not be started: ${event.message}`);

const answers = {
  loaded() {
    show_figures();
    set_busy(false);
  },

  text({ job, ids, from, losses }) {
    if (job !== text.job) return;
    append(ids.map((id) => VOCABULARY.characters[id]));
    losses.forEach((loss, i) => set_loss(from + i, loss));
    progress();
  },

  ended({ job, stopped, seconds }) {
    if (job !== text.job) return;
    text.ended = true;
    set_busy(false);
    append_next();
    progress(stopped ? "Stopped." : "Done.", seconds);
    if (inside.position) look();
  },

  seen({ job, position, logits, weights, first }) {
    if (job !== inside.job) return;
    Object.assign(inside, { logits, seen: position });
    show_bars();
    show_attention(weights, first);
  },

  failed({ job, message }) {
    if (job === text.job) set_busy(false);
    problem(message);
  },
};

// ---- the text ----

// characters and what stands for each on the page; `written`: by the network, after a prompt
const text = {
  job: 0, characters: [], spans: [], losses: [], line: null, start: 0, written: true, ended: true,
}; // prettier-ignore

function begin(characters, written) {
  let_go();
  $("text").replaceChildren();
  Object.assign(text, { characters: [], spans: [], losses: [], line: null, written, ended: false });
  text.start = written ? characters.length : 0;
  append(characters, written);
  $("copy").disabled = false;
  $("position").disabled = false;
  set_busy(true);
}

function append(characters, prompt = false) {
  if (!characters.length) return;
  for (const character of characters) {
    const span = add_span(character === "\n" ? "newline" : "");
    span.textContent = character;
    if (prompt) span.classList.add("prompt");
    if (character === "\n") text.line = null;
    text.characters.push(character);
  }
  $("position").max = text.characters.length;
  $("of").textContent = `of ${grouped(text.characters.length)}`;
}

// After the last character one can look as well: what would come next?
const append_next = () => add_span("next");

// Lines are blocks of their own, so that the browser lays out the newest one only and not all of a
// long text each time.
function add_span(name) {
  if (!text.line) {
    text.line = document.createElement("div");
    $("text").append(text.line);
  }
  const span = document.createElement("span");
  span.className = name;
  span.position = text.spans.length;
  text.spans.push(span);
  text.line.append(span);
  return span;
}

const bits = (loss) => loss / Math.LN2;

function set_loss(position, loss) {
  text.losses[position] = loss;
  text.spans[position].style.setProperty("--loss", Math.min(1, bits(loss) / MOST_BITS).toFixed(3));
}

function mean_bits() {
  const known = text.losses.filter((loss) => loss !== undefined);
  return known.length ? bits(known.reduce((a, b) => a + b, 0) / known.length) : null;
}

// Said once when it begins and once when it ends: a screen reader is not to hear every character.
function progress(end, seconds) {
  const count = text.characters.length - text.start;
  if (!end) {
    const what = text.written ? "Writing …" : "Reading …";
    if ($("status").textContent !== what) $("status").textContent = what;
    return;
  }
  const mean = mean_bits();
  const per_second = seconds > 0.2 ? `, ${grouped(Math.round(count / seconds))} per second` : "";
  const surprise = mean === null ? "" : ` Surprise: ${mean.toFixed(3)} bits per character on average.`;
  const done = text.written ? `${grouped(count)} characters written` : `${grouped(count)} characters read`;
  $("status").textContent = `${end} ${done}${per_second}.${surprise}`;
}

// ---- the form ----

const NUMBERS = ["temperature", "top_k", "top_p", "max_new_chars"];

function settings() {
  const [temperature, top_k, top_p, max_new_chars] = NUMBERS.map((id) => $(id).valueAsNumber);
  const all = top_k === VOCABULARY.characters.length;
  return { temperature, top_k: all ? null : top_k, top_p: top_p === 1 ? null : top_p, max_new_chars };
}

function seed() {
  const typed = $("seed").value.trim();
  if (!/^[+-]?\d+$/.test(typed)) throw new Error(`the seed is ${typed || "empty"}; it must be a whole number`);
  return BigInt(typed.replace("+", ""));
}

function show_settings() {
  const { temperature, top_k, top_p } = settings();
  const shown = { temperature: temperature.toFixed(2), top_k: top_k ?? "all", top_p: top_p?.toFixed(2) ?? "all" };
  for (const [id, value] of Object.entries(shown)) {
    $(`${id}-value`).textContent = value;
    $(id).setAttribute("aria-valuetext", value);
  }
  if (inside.logits) show_bars();
}

function problem(message, field = null) {
  $("problem").textContent = message;
  for (const id of ["prompt", "seed", "max_new_chars"])
    id === field ? $(id).setAttribute("aria-invalid", "true") : $(id).removeAttribute("aria-invalid");
  if (field) $(field).focus();
}

// Do something with the form; what is wrong with it is said beside it.
function attempt(field, action) {
  try {
    const result = action();
    problem("");
    return result;
  } catch (error) {
    problem(error.message, field);
    return null;
  }
}

function write() {
  const prompt = attempt("prompt", () => VOCABULARY.encode($("prompt").value || VOCABULARY.opening));
  const number = prompt && attempt("seed", seed);
  const chosen = { ...settings(), seed: number };
  if (number === null || attempt("max_new_chars", () => check_settings(chosen) ?? true) === null) return;
  begin(prompt.map((id) => VOCABULARY.characters[id]), true);
  text.job = ask("write", { prompt, settings: chosen });
  progress();
}

function score() {
  const ids = attempt("prompt", () => {
    const ids = VOCABULARY.encode($("prompt").value);
    if (ids.length < 2) throw new Error("a text of fewer than two characters has none to predict");
    if (ids.length > MOST_READ)
      throw new Error(`the text has ${grouped(ids.length)} characters; here it can have ${grouped(MOST_READ)}`);
    return ids;
  });
  if (ids === null) return;
  begin(ids.map((id) => VOCABULARY.characters[id]), false);
  text.job = ask("score", { ids });
  progress();
}

function set_busy(busy) {
  const starting = ["write", "score", "another"].map($);
  const focused = document.activeElement;
  $("stop").disabled = !busy;
  // a button that can no longer be pressed hands the focus on, else the keyboard is lost
  if (busy && starting.includes(focused)) $("stop").focus();
  for (const button of starting) button.disabled = busy;
  if (!busy && focused === $("stop")) $(text.written ? "write" : "score").focus();
}

async function copy() {
  const written = text.characters.join("");
  try {
    await navigator.clipboard.writeText(written);
  } catch {
    // where a page from the disk has no clipboard: select it, and copy as if with a key
    const area = document.createElement("textarea");
    area.value = written;
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
    $("copy").focus();
  }
  $("status").textContent = `Copied ${grouped(text.characters.length)} characters.`;
}

// ---- looking inside ----

// the character that is looked at, and the logits from which it was drawn
const inside = { job: 0, position: null, logits: null, seen: null };

function select(position) {
  const end = text.ended ? text.characters.length : text.characters.length - 1;
  if (end < 1) return;
  position = Math.max(1, Math.min(end, position));
  mark("selected", position);
  inside.position = position;
  $("position").value = position;
  look();
}

function look() {
  const { position } = inside;
  const chosen = $("head").value;
  const head = chosen === "mean" ? null : Number(chosen);
  inside.job = ask("look", { position, layer: Number($("layer").value), head });
}

function let_go() {
  for (const name of ["selected", "from"]) mark(name, null);
  Object.assign(inside, { job: 0, position: null, logits: null, seen: null });
  for (const span of shaded.splice(0)) span.style.removeProperty("--weight");
  $("position").value = "";
  $("inside").hidden = true;
  $("meanwhile").hidden = false;
}

function mark(name, position) {
  $("text").querySelector(`.${name}`)?.classList.remove(name);
  if (position !== null) text.spans[position].classList.add(name);
}

// A character as it can be seen: one that is invisible or would join its neighbor has a name.
function visible(character) {
  const names = { " ": "space", "\n": "newline", "\t": "tab", "\r": "return" };
  if (character in names) return [names[character], true];
  const hidden = /[\p{C}\p{Z}\p{M}]/u.test(character);
  return hidden ? [code_name(character), true] : [character, false];
}

const percent = (share) =>
  share >= 0.0995 ? `${(share * 100).toFixed(0)} %` : share >= 0.001 ? `${(share * 100).toFixed(1)} %`
    : share > 0 ? "<0.1 %" : "0 %"; // prettier-ignore

function show_bars() {
  const { logits, seen } = inside;
  const [network, drawn] = [softmax(logits), probabilities_of(logits, settings())];
  const actual = seen < text.characters.length ? VOCABULARY.ids.get(text.characters[seen]) : null;
  const order = by_falling(logits);
  const shown = order.slice(0, BARS);
  if (actual !== null && !shown.includes(actual)) shown.push(actual);
  const most = Math.max(network[shown[0]], ...shown.map((id) => drawn[id]));
  $("bars").replaceChildren(...shown.map((id) => bar(id, network[id], drawn[id], most, id === actual)));
  $("seen").replaceChildren(...describe_seen(actual, network, order));
  $("inside").hidden = false;
  $("meanwhile").hidden = true;
}

function bar(id, network, drawn, most, is_actual) {
  const element = (tag, className, content) => {
    const made = document.createElement(tag);
    made.className = className;
    if (typeof content === "number") made.style.setProperty("--share", (content / most).toFixed(4));
    else if (content !== undefined) made.textContent = content;
    return made;
  };
  const [name, is_code] = visible(VOCABULARY.characters[id]);
  const item = element("li", is_actual ? "actual" : "");
  const track = element("span", "bar");
  track.ariaHidden = "true";
  track.append(element("i", "network", network), element("i", "settings-share", drawn));
  const label = element("bdi", is_code ? "name code" : "name", name);
  const heard = element("span", "hidden", `, ${percent(network)} by the network${is_actual ? ", in the text" : ""}`);
  item.append(label, track, element("span", "percent", percent(drawn)), heard);
  item.title = `the network: ${percent(network)}; with these settings: ${percent(drawn)}`;
  return item;
}

function describe_seen(actual, network, order) {
  if (actual === null) return ["What would come next?"];
  const [name, is_code] = visible(VOCABULARY.characters[actual]);
  const shown = document.createElement("bdi");
  shown.textContent = !is_code ? `“${name}”` : name.startsWith("U+") ? name : `a ${name}`;
  const surprise = (-Math.log2(network[actual])).toFixed(2);
  const rank = order.indexOf(actual) + 1;
  const place = rank === 1 ? "its first guess" : `number ${grouped(rank)} of its guesses`;
  return ["Here stands ", shown, `. The network gave it ${percent(network[actual])}, ${place}: ${surprise} bits.`];
}

const shaded = []; // the characters that have a share of attention

function show_attention(weights, first) {
  for (const span of shaded.splice(0)) span.style.removeProperty("--weight");
  const most = weights.reduce((a, b) => Math.max(a, b), 0);
  weights.forEach((weight, i) => {
    const span = text.spans[first + i];
    span.style.setProperty("--weight", (weight / most).toFixed(3));
    shaded.push(span);
  });
  mark("from", inside.seen - 1);
  const by_weight = by_falling(weights).slice(0, 3);
  const named = by_weight.map((i) => {
    const [name, is_code] = visible(text.characters[first + i]);
    return `${is_code ? name : `“${name}”`} (character ${first + i}, ${percent(weights[i])})`;
  });
  const who = $("head").value === "mean" ? "the heads of this layer" : "this head";
  $("looked").textContent =
    `To guess this character, the network stood on the one before it (dotted), and ${who} looked back from ` +
    `there at the characters that “Shade by attention” darkens. Most at ${named.join(", ")}. ` +
    `It could see ${grouped(weights.length)} ${weights.length === 1 ? "character" : "characters"}.`;
}

function show_shade() {
  const shade = document.querySelector("input[name=shade]:checked").value;
  $("text").dataset.shade = shade;
  const scale = document.createElement("span");
  scale.className = `scale ${shade}`;
  $("legend").replaceChildren(
    ...{
      surprise: ["expected", scale, `surprising (${MOST_BITS} bits and more). Italic: your text.`],
      attention: ["not looked at", scale, "looked at most. Choose a character to see from where."],
      nothing: [],
    }[shade],
  );
}

// ---- keys and clicks ----

function on_key(event) {
  const here = inside.position ?? 0;
  const moves = {
    ArrowLeft: () => here - 1,
    ArrowRight: () => here + 1,
    ArrowUp: () => in_line(here, -1),
    ArrowDown: () => in_line(here, 1),
    Home: () => 1,
    End: () => text.characters.length,
  };
  if (event.altKey || event.ctrlKey || event.metaKey) return;
  if (event.key === "Escape") let_go();
  else if (event.key in moves && text.characters.length) {
    event.preventDefault();
    select(moves[event.key]());
    text.spans[inside.position]?.scrollIntoView({ block: "nearest" });
  }
}

// The character above or below: the nearest in the next line that has one.
function in_line(position, direction) {
  const box = text.spans[position].getBoundingClientRect();
  let [best, distance, line] = [position + direction, Infinity, null];
  for (let i = position + direction; i >= 0 && i < text.spans.length; i += direction) {
    const { left, top } = text.spans[i].getBoundingClientRect();
    if (Math.abs(top - box.top) < box.height / 2) continue;
    line ??= top;
    if (Math.abs(top - line) > box.height / 2) break;
    if (Math.abs(left - box.left) < distance) [best, distance] = [i, Math.abs(left - box.left)];
  }
  return best;
}

function show_figures() {
  const { parameters, corpus, steps, val_loss } = DATA.figures;
  const { n_layer, n_head, block_size } = DATA.config;
  const rounded = new Intl.NumberFormat("en-US", { notation: "compact", compactDisplay: "long", maximumFractionDigits: 1 });
  const count = (n, noun) => `${n} ${noun}${n === 1 ? "" : "s"}`;
  const trained = [
    corpus && `It was trained on ${corpus}, ${grouped(steps)} steps.`,
    val_loss !== null && `On text that it had not seen its surprise was ${bits(val_loss).toFixed(2)} bits per character.`,
  ];
  $("figures").textContent = [
    `${rounded.format(parameters)} parameters in ${count(n_layer, "layer")} of ${count(n_head, "head")};`,
    `it knows ${count(grouped(VOCABULARY.characters.length), "character")} and looks back over at most ${grouped(block_size)}.`,
    ...trained.filter(Boolean),
  ].join(" ");
}

function fill_choices() {
  const option = (label, value) => new Option(label, value);
  for (let i = 0; i < DATA.config.n_layer; i++) $("layer").append(option(`Layer ${i + 1}`, i));
  $("head").append(option("All (mean)", "mean"));
  for (let i = 0; i < DATA.config.n_head; i++) $("head").append(option(`Head ${i + 1}`, i));
  const { max_new_chars, temperature, top_k, top_p, seed } = DATA.settings;
  $("top_k").max = VOCABULARY.characters.length;
  const defaults = { max_new_chars, temperature, seed, top_p: top_p ?? 1, top_k: top_k ?? $("top_k").max };
  for (const [id, value] of Object.entries(defaults)) $(id).value = value;
  $("same").textContent =
    "The same text, seed and settings give the same characters here and in “python -m chargpt predict”.";
}

function start() {
  fill_choices();
  show_settings();
  show_shade();
  const on = (id, event, handler) => $(id).addEventListener(event, handler);
  on("form", "submit", (event) => (event.preventDefault(), $("write").disabled || write()));
  on("form", "input", show_settings);
  on("prompt", "keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && !$("write").disabled) write();
  });
  on("score", "click", score);
  on("stop", "click", () => ask("stop"));
  on("another", "click", () => {
    const number = attempt("seed", seed);
    if (number === null) return;
    $("seed").value = String(number + 1n);
    write();
  });
  on("copy", "click", copy);
  on("text", "click", (event) => event.target.position !== undefined && select(event.target.position));
  on("text", "keydown", on_key);
  on("position", "change", () => $("position").value && select($("position").valueAsNumber));
  for (const id of ["layer", "head"])
    on(id, "change", () => {
      document.querySelector("input[value=attention]").checked = true;
      show_shade();
      if (inside.position) look();
    });
  for (const radio of document.querySelectorAll("input[name=shade]")) radio.addEventListener("change", show_shade);
  $("how").open = innerWidth > 900; // on a phone, the text is what matters
  const base64 = $("weights").textContent;
  $("weights").remove(); // the worker has its own copy
  ask("load", { config: DATA.config, vocab_size: VOCABULARY.characters.length, weights: DATA.weights, base64 });
}

start();
