"use strict";
// The user interface. The network runs in a worker, so the page stays responsive.

const $ = (id) => document.getElementById(id);
const DATA = JSON.parse($("data").textContent);
const VOCABULARY = new Vocabulary(DATA.vocabulary, DATA.stand_ins);
const BARS = 10; // characters shown as bars
const MOST_BITS = 8; // the surprise at which the color saturates
const MOST_READ = 20_000; // maximum length of a text to score; its queries and keys stay in memory

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
worker.onerror = (event) => problem(`Could not start the network: ${event.message}`);

const answers = {
  loaded() {
    show_figures();
    set_busy(false);
    write();
  },

  text({ job, ids, from, losses }) {
    if (job !== text.job) return;
    append(ids.map((id) => VOCABULARY.characters[id]));
    losses.forEach((loss, i) => set_loss(from + i, loss));
    follow();
    progress();
  },

  ended({ job, stopped, seconds }) {
    if (job !== text.job) return;
    text.ended = true;
    set_busy(false);
    append_next();
    // again in the next frames, since lines get their heights when they are first painted
    requestAnimationFrame(() => (follow(), requestAnimationFrame(follow)));
    $("plain").textContent = text.characters.join("");
    progress(stopped ? "Stopped." : "Done.", seconds);
    if (inside.position !== null) look();
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

// the characters and their elements; `written`: generated from a prompt, otherwise scored
const text = {
  job: 0, characters: [], spans: [], losses: [], line: null, start: 0, written: true, ended: true,
  followed: true, top: 0, // whether the end of the text is kept in view, and where it was scrolled to
}; // prettier-ignore

function begin(characters, written) {
  clear_selection();
  $("text").replaceChildren();
  $("plain").textContent = "";
  Object.assign(text, { characters: [], spans: [], losses: [], line: null, written, ended: false });
  Object.assign(text, { followed: true, top: 0 });
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
  $("text").setAttribute("aria-valuemax", text.characters.length);
  $("of").textContent = `of ${grouped(text.characters.length)}`;
}

// The position after the last character can be selected too, to see what would come next.
const append_next = () => add_span("next");

// Each line is a block of its own, so that the browser lays out only the newest line of a long text
// for each new character.
function add_span(name) {
  if (!text.line) {
    text.line = document.createElement("div");
    text.line.ariaHidden = "true"; // screen readers get #plain instead of a node for each character
    $("text").append(text.line);
  }
  const span = document.createElement("span");
  span.className = name;
  span.position = text.spans.length;
  text.spans.push(span);
  text.line.append(span);
  return span;
}

// Keep the end of the text in view while it grows, unless the user has scrolled away from it.
function follow() {
  if (!text.followed || inside.position !== null) return;
  $("text").scrollTop = $("text").scrollHeight;
  text.top = $("text").scrollTop;
}

const note_scroll = () => (text.followed = $("text").scrollTop >= text.top - 2);

const bits = (loss) => loss / Math.LN2;

function set_loss(position, loss) {
  text.losses[position] = loss;
  text.spans[position].style.setProperty("--loss", Math.min(1, bits(loss) / MOST_BITS).toFixed(3));
}

function mean_bits() {
  const known = text.losses.filter((loss) => loss !== undefined);
  return known.length ? bits(known.reduce((a, b) => a + b, 0) / known.length) : null;
}

// Announced once at the start and once at the end, so that a screen reader doesn't read each update.
function progress(end, seconds) {
  const count = text.characters.length - text.start;
  if (!end) {
    const status = text.written ? "Generating …" : "Scoring …";
    if ($("status").textContent !== status) $("status").textContent = status;
    return;
  }
  const mean = mean_bits();
  const per_second = seconds > 0.2 ? `, ${grouped(Math.round(count / seconds))} per second` : "";
  const surprise = mean === null ? "" : ` Average surprise: ${mean.toFixed(3)} bits per character.`;
  const done = `${grouped(count)} characters ${text.written ? "generated" : "scored"}`;
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
  const { max_new_chars } = settings();
  $("chosen").textContent =
    `temperature ${shown.temperature}, top-k ${shown.top_k}, top-p ${shown.top_p}, ` +
    `length ${max_new_chars || 0}, seed ${$("seed").value}`;
  if (inside.logits) show_bars();
}

// The form's values survive a reload in the history entry; storage is not available to all local files.
const FIELDS = ["prompt", "seed", ...NUMBERS];

function save_form() {
  history.replaceState(Object.fromEntries(FIELDS.map((id) => [id, $(id).value])), "");
}

function problem(message, field = null) {
  $("problem").textContent = message;
  if (message) $("status").textContent = "";
  for (const id of ["prompt", "seed", "max_new_chars"])
    id === field ? $(id).setAttribute("aria-invalid", "true") : $(id).removeAttribute("aria-invalid");
  if (field && NUMBERS.concat("seed").includes(field)) $("how").open = true;
  if (field) $(field).focus();
}

// Run an action on the form and show its error, if any, next to the field.
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
  if (number === null || attempt("max_new_chars", () => check_form(chosen)) === null) return;
  begin(prompt.map((id) => VOCABULARY.characters[id]), true);
  text.job = ask("write", { prompt, settings: chosen });
  progress();
}

function check_form(chosen) {
  if (Number.isNaN(chosen.max_new_chars)) throw new Error("the length is empty; it must be a whole number of at least 0");
  check_settings(chosen);
  return true;
}

function score() {
  const ids = attempt("prompt", () => {
    const ids = VOCABULARY.encode($("prompt").value);
    if (ids.length < 2) throw new Error("scoring needs a text of at least two characters");
    if (ids.length > MOST_READ)
      throw new Error(`the text has ${grouped(ids.length)} characters; the maximum here is ${grouped(MOST_READ)}`);
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
  // a button that becomes disabled passes the focus on, otherwise keyboard users lose their place
  if (busy && starting.includes(focused)) $("stop").focus();
  for (const button of starting) button.disabled = busy;
  if (!busy && focused === $("stop")) $(text.written ? "write" : "score").focus();
}

async function copy() {
  const written = text.characters.join("");
  try {
    await navigator.clipboard.writeText(written);
  } catch {
    // fallback where pages from the disk have no clipboard access: select the text and copy it
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

// ---- inside the network ----

// the selected character, and the logits from which it was sampled
const inside = { job: 0, position: null, logits: null, seen: null };

function select(position) {
  const end = text.ended ? text.characters.length : text.characters.length - 1;
  if (end < 0 || !Number.isFinite(position)) return;
  position = Math.max(0, Math.min(end, Math.round(position)));
  mark("selected", position);
  inside.position = position;
  $("position").value = position + 1;
  $("text").setAttribute("aria-valuenow", position + 1);
  $("text").setAttribute("aria-valuetext", `${position + 1}: ${name_of(position)}`);
  $("close").hidden = false;
  $("meanwhile").hidden = true;
  document.querySelector("aside").classList.add("open");
  look();
  text.spans[position].scrollIntoView({ block: "nearest" });
}

function name_of(position) {
  return position < text.characters.length ? visible(text.characters[position])[0] : "what would come next";
}

function look() {
  const { position } = inside;
  if (position === 0) return show_first();
  const chosen = $("head").value;
  const head = chosen === "mean" ? null : Number(chosen);
  inside.job = ask("look", { position, layer: Number($("layer").value), head });
}

function clear_selection() {
  for (const name of ["selected", "from"]) mark(name, null);
  Object.assign(inside, { job: 0, position: null, logits: null, seen: null });
  for (const span of shaded.splice(0)) span.style.removeProperty("--weight");
  $("position").value = "";
  $("text").setAttribute("aria-valuetext", "none selected");
  $("seen").textContent = "";
  $("inside").hidden = $("close").hidden = true;
  $("meanwhile").hidden = false;
  document.querySelector("aside").classList.remove("open");
}

// The network predicts each character from those before it, so it does not predict the first.
function show_first() {
  Object.assign(inside, { job: 0, logits: null, seen: 0 });
  mark("from", null);
  for (const span of shaded.splice(0)) span.style.removeProperty("--weight");
  $("inside").hidden = true;
  $("seen").textContent = "The network does not predict the first character: there is none before it.";
}

function mark(name, position) {
  $("text").querySelector(`.${name}`)?.classList.remove(name);
  if (position !== null) text.spans[position].classList.add(name);
}

// A printable form of a character: invisible and combining ones are shown by name.
function visible(character) {
  const names = { " ": "space", "\n": "newline", "\t": "tab", "\r": "return" };
  if (character in names) return [names[character], true];
  const hidden = /[\p{C}\p{Z}\p{M}]/u.test(character);
  return hidden ? [code_name(character), true] : [character, false];
}

const percent = (p) =>
  p >= 0.0995 ? `${(p * 100).toFixed(0)} %` : p >= 0.001 ? `${(p * 100).toFixed(1)} %`
    : p > 0 ? "<0.1 %" : "0 %"; // prettier-ignore

function show_bars() {
  const { logits, seen } = inside;
  const [network, drawn] = [softmax(logits), probabilities_of(logits, settings())];
  const actual = seen < text.characters.length ? VOCABULARY.ids.get(text.characters[seen]) : null;
  const order = descending(logits);
  const shown = order.slice(0, BARS);
  if (actual !== null && !shown.includes(actual)) shown.push(actual);
  const most = Math.max(network[shown[0]], ...shown.map((id) => drawn[id]));
  $("bars").replaceChildren(...shown.map((id) => bar(id, network[id], drawn[id], most, id === actual)));
  $("seen").replaceChildren(...describe_seen(actual, network, order));
  $("inside").hidden = false;
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
  const details = `, ${percent(network)} before sampling settings${is_actual ? ", the character in the text" : ""}`;
  item.append(label, track, element("span", "percent", percent(drawn)), element("span", "hidden", details));
  item.title = `network: ${percent(network)}; with sampling settings: ${percent(drawn)}`;
  return item;
}

function describe_seen(actual, network, order) {
  if (actual === null) return ["What would come next?"];
  const [name, is_code] = visible(VOCABULARY.characters[actual]);
  const shown = document.createElement("bdi");
  shown.textContent = !is_code ? `“${name}”` : name.startsWith("U+") ? name : `a ${name}`;
  const surprise = (-Math.log2(network[actual])).toFixed(2);
  const rank = order.indexOf(actual) + 1;
  const place = rank === 1 ? "its first guess" : `guess number ${grouped(rank)}`;
  return ["The text has ", shown, `. Predicted probability: ${percent(network[actual])} (${place}), ${surprise} bits.`];
}

const shaded = []; // the characters with an attention weight

function show_attention(weights, first) {
  for (const span of shaded.splice(0)) span.style.removeProperty("--weight");
  const most = weights.reduce((a, b) => Math.max(a, b), 0);
  weights.forEach((weight, i) => {
    const span = text.spans[first + i];
    span.style.setProperty("--weight", (weight / most).toFixed(3));
    shaded.push(span);
  });
  mark("from", inside.seen - 1);
  const by_weight = descending(weights).slice(0, 3);
  const named = by_weight.map((i) => {
    const [name, is_code] = visible(text.characters[first + i]);
    return `${is_code ? name : `“${name}”`} (character ${first + i + 1}, ${percent(weights[i])})`;
  });
  const who = $("head").value === "mean" ? "The heads of this layer" : "This head";
  $("looked").textContent =
    `The network predicts this character at the position before it (dotted). ${who} attended to the characters ` +
    `that “Shade by attention” highlights, most to ${named.join(", ")}. The context had ` +
    `${grouped(weights.length)} ${weights.length === 1 ? "character" : "characters"}.`;
}

function show_shade() {
  const shade = document.querySelector("input[name=shade]:checked").value;
  $("text").dataset.shade = shade;
  const scale = document.createElement("span");
  scale.className = `scale ${shade}`;
  $("legend").replaceChildren(
    ...{
      surprise: ["expected", scale, `surprising (${MOST_BITS} bits or more). Italic: your prompt.`],
      attention: ["no attention", scale, "most attention. Select a character to see what it attends to."],
      nothing: [],
    }[shade],
  );
}

// ---- keys and clicks ----

function on_key(event) {
  const here = inside.position;
  const from = (move) => (here === null ? 0 : move());
  const moves = {
    ArrowLeft: () => from(() => here - 1),
    ArrowRight: () => from(() => here + 1),
    ArrowUp: () => from(() => in_line(here, -1)),
    ArrowDown: () => from(() => in_line(here, 1)),
    Home: () => 0,
    End: () => text.characters.length,
  };
  if (event.altKey || event.ctrlKey || event.metaKey) return;
  if (event.key === "Escape") clear_selection();
  else if (event.key in moves && text.characters.length) {
    event.preventDefault();
    select(moves[event.key]());
  }
}

// The position of the nearest character in the line above or below.
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
    corpus && `Trained on ${corpus} for ${grouped(steps)} steps.`,
    val_loss !== null && `Validation loss: ${bits(val_loss).toFixed(2)} bits per character.`,
  ];
  $("figures").textContent = [
    `${rounded.format(parameters)} parameters, ${count(n_layer, "layer")} with ${count(n_head, "head")} each,`,
    `a vocabulary of ${count(grouped(VOCABULARY.characters.length), "character")}, a context of up to ${grouped(block_size)}.`,
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
  $("prompt").value = first_prompt();
  for (const [id, value] of Object.entries(history.state ?? {})) if (FIELDS.includes(id)) $(id).value = value;
  $("same").textContent =
    "The same prompt, seed and settings give the same text here and in “python -m chargpt predict”.";
}

// A prompt to start with, in characters that the network knows.
function first_prompt() {
  const known = (text) => Array.from(text).every((character) => VOCABULARY.ids.has(character));
  const { corpus } = DATA.figures;
  const candidates = [corpus === "tiny-shakespeare" ? "ROMEO:\n" : "The ", "the ", "A", "a"];
  const letter = VOCABULARY.characters.find((character) => /[\p{L}\p{N}]/u.test(character));
  return candidates.find(known) ?? letter ?? VOCABULARY.opening;
}

function start() {
  document.querySelector("main").hidden = false;
  $("figures").textContent = "Loading the network …";
  fill_choices();
  show_settings();
  show_shade();
  const on = (id, event, handler) => $(id).addEventListener(event, handler);
  const write_in_view = () => (write(), $("text").scrollIntoView({ block: "nearest" }));
  on("form", "submit", (event) => (event.preventDefault(), $("write").disabled || write_in_view()));
  on("form", "input", () => (show_settings(), save_form()));
  on("prompt", "keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && !$("write").disabled) write_in_view();
  });
  on("text", "scroll", note_scroll);
  on("close", "click", () => (clear_selection(), $("text").focus()));
  on("score", "click", score);
  on("stop", "click", () => ask("stop"));
  on("another", "click", () => {
    const number = attempt("seed", seed);
    if (number === null) return;
    $("seed").value = String(number + 1n);
    show_settings();
    save_form();
    write();
  });
  on("copy", "click", copy);
  on("text", "click", (event) => event.target.position !== undefined && select(event.target.position));
  on("text", "keydown", on_key);
  on("position", "change", () => $("position").value && select($("position").valueAsNumber - 1));
  for (const id of ["layer", "head"])
    on(id, "change", () => {
      document.querySelector("input[value=attention]").checked = true;
      show_shade();
      if (inside.position !== null) look();
    });
  for (const radio of document.querySelectorAll("input[name=shade]")) radio.addEventListener("change", show_shade);
  const base64 = $("weights").textContent;
  $("weights").remove(); // the worker has its own copy
  ask("load", { config: DATA.config, vocab_size: VOCABULARY.characters.length, weights: DATA.weights, base64 });
}

start();
