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
    if (inside.position === null && text.reselect !== null) select(text.reselect);
    else if (inside.position !== null) look();
    text.reselect = null;
  },

  seen({ job, position, logits, weights, first, trace }) {
    if (job !== inside.job) return;
    Object.assign(inside, { seen: position, logits, weights, first, trace });
    $("seen").replaceChildren(...describe_seen());
    show_inside();
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
  request: null, past: [], reselect: null, // what was asked for; before a "what if"; what to select at the end
  followed: true, top: 0, // whether the end of the text is kept in view, and where it was scrolled to
}; // prettier-ignore

// Show and start a request: { type: "write", prompt, settings, start, changed, note }, where the prompt's
// first `start` characters were typed and the one at `changed` was put there; or { type: "score", ids }.
function run(request) {
  const { type, start = 0, changed = null } = request;
  const characters = (request.prompt ?? request.ids).map((id) => VOCABULARY.characters[id]);
  clear_selection();
  $("text").replaceChildren();
  $("plain").textContent = "";
  Object.assign(text, { characters: [], spans: [], losses: [], line: null, written: type === "write", ended: false });
  Object.assign(text, { request, reselect: null, followed: true, top: 0 });
  text.start = text.written ? characters.length : 0;
  append(characters.slice(0, start), true);
  append(characters.slice(start));
  if (changed !== null) text.spans[changed].classList.add("changed");
  $("copy").disabled = false;
  $("position").disabled = false;
  $("undo").hidden = !text.past.length;
  set_busy(true);
  text.job = ask(type, request);
  progress();
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
    text.line.setAttribute("aria-hidden", "true"); // screen readers get #plain instead of a node for each character
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
  const note = text.request.note ?? "";
  $("status").textContent = `${note}${end} ${done}${per_second}.${surprise}`;
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
  if (inside.trace && stage().id === "guess") show_guess();
}

// The form's values survive a reload in the history entry; storage is not available to all local files.
const FIELDS = ["prompt", "seed", ...NUMBERS];
let saving = 0;

function save_soon() {
  clearTimeout(saving);
  saving = setTimeout(save_form, 400); // browsers limit how often the entry may be replaced
}

function save_form() {
  clearTimeout(saving);
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
  save_form();
  text.past = [];
  run({ type: "write", prompt, settings: chosen, start: prompt.length });
}

function check_form(chosen) {
  if (Number.isNaN(chosen.max_new_chars))
    throw new Error("the length is empty; it must be a whole number of at least 0");
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
  save_form();
  text.past = [];
  run({ type: "score", ids });
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

// The selected character, what the worker found about it (see Server.look), the open stage, the last
// character of the maps, and the character whose key is shown.
const inside = { position: null, stage: null, until: -1, key: null };

function forget() {
  Object.assign(inside, { job: 0, seen: null, logits: null, weights: [], first: 0, trace: null });
}

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
  $("inside").classList.add("open");
  look();
  text.spans[position].scrollIntoView({ block: "nearest" });
}

function look() {
  const { position, until } = inside;
  if (position === 0) return show_first();
  const head = $("head").value === "mean" ? null : Number($("head").value);
  const maps = stage().layer === undefined ? null : until;
  inside.job = ask("look", { position, layer: Number($("layer").value), head, until: maps });
}

function clear_selection() {
  forget();
  inside.position = null;
  mark("selected", null);
  $("position").value = "";
  $("text").setAttribute("aria-valuetext", "none selected");
  $("seen").textContent = "";
  $("close").hidden = true;
  $("inside").classList.remove("open");
  show_inside();
}

// The network predicts each character from those before it, so it does not predict the first.
function show_first() {
  forget();
  inside.seen = 0;
  $("seen").textContent = "The network does not predict the first character: nothing comes before it.";
  show_inside();
}

function show_inside() {
  show_diagram();
  show_attention();
  show_details();
}

function mark(name, position) {
  $("text").querySelector(`.${name}`)?.classList.remove(name);
  if (position !== null) text.spans[position].classList.add(name);
}

function make(tag, className = "", ...children) {
  const element = document.createElement(tag);
  element.className = className;
  element.append(...children);
  return element;
}

const style = (element, properties) => {
  for (const [name, value] of Object.entries(properties)) element.style.setProperty(`--${name}`, value);
  return element;
};

// A printable form of a character: invisible and combining ones are shown by name.
function visible(character) {
  const names = { " ": "space", "\n": "newline", "\t": "tab", "\r": "return" };
  if (character in names) return [names[character], true];
  const hidden = /[\p{C}\p{Z}\p{M}]/u.test(character);
  return hidden ? [code_name(character), true] : [character, false];
}

function quoted(character) {
  const [name, is_code] = visible(character);
  return is_code ? name : `“${name}”`;
}

const SHORT = { " ": "␣", "\n": "↵", "\t": "⇥", "\r": "␍" };
const short = (character) => SHORT[character] ?? visible(character)[0];
const quoted_id = (id) => quoted(VOCABULARY.characters[id]);
const name_of = (position) =>
  position < text.characters.length ? visible(text.characters[position])[0] : "what would come next";

// The id of the character that the network predicted, null after the end of the text.
const actual_id = () =>
  inside.seen < text.characters.length ? VOCABULARY.ids.get(text.characters[inside.seen]) : null;

const percent = (p) =>
  p >= 0.0995 ? `${(p * 100).toFixed(0)}%` : p >= 0.001 ? `${(p * 100).toFixed(1)}%`
    : p > 0 ? "<0.1%" : "0%"; // prettier-ignore

function describe_seen() {
  const actual = actual_id();
  if (actual === null) return ["What would come next?"];
  const [name, is_code] = visible(VOCABULARY.characters[actual]);
  const shown = make("bdi", "", !is_code ? `“${name}”` : name.startsWith("U+") ? name : `a ${name}`);
  const probability = softmax(inside.logits)[actual];
  const rank = descending(inside.logits).indexOf(actual) + 1;
  const place = rank === 1 ? "its first guess" : `guess number ${grouped(rank)}`;
  const surprise = (-Math.log2(probability)).toFixed(2);
  return ["The text has ", shown, `. Predicted probability: ${percent(probability)} (${place}), ${surprise} bits.`];
}

// ---- the diagram: the stages of the network with the shapes of their results ----

const { n_embd: C, n_head: H, n_layer: L } = DATA.config;
const V = VOCABULARY.characters.length;

// Each stage: its name, its shape for T characters, its explanation, and what shows its numbers.
// `lens`: which result of the logit lens it has; `layer`: of its attention.
const STAGES = [
  { id: "characters", name: "Characters", shape: (T) => `(${T})`, explain: explain_characters, show: show_characters },
  { id: "embeddings", name: "Embeddings", shape: (T) => `(${T}, ${C})`, lens: 0, explain: explain_embeddings,
    show: show_embeddings },
  ...Array.from({ length: L }, (_, layer) => [
    { id: `attention ${layer}`, name: `Attention ${layer + 1}`, shape: (T) => `(${H}, ${T}, ${T})`, branch: true, layer,
      explain: explain_attention, show: () => show_attention_numbers(layer) },
    { id: `feed-forward ${layer}`, name: `Feed-forward ${layer + 1}`, shape: (T) => `(${T}, ${4 * C})`, branch: true,
      explain: explain_feed_forward, show: () => show_hidden(layer) },
    { id: `block ${layer}`, name: `After block ${layer + 1}`, shape: (T) => `(${T}, ${C})`, lens: layer + 1,
      explain: explain_lens, show: () => show_lens(layer + 1) },
  ]).flat(),
  { id: "logits", name: "Logits", shape: (T) => `(${T}, ${V})`, explain: explain_logits, show: show_logits },
  { id: "guess", name: "Sampling", shape: () => `(${V})`, explain: explain_guess, show: show_guess },
]; // prettier-ignore

const stage = () => STAGES.find(({ id }) => id === inside.stage);

function fill_diagram() {
  for (const entry of STAGES) {
    entry.cells = ["name", "shape", "guess", "bits"].map((name) => make("span", name));
    entry.cells[0].textContent = entry.name;
    const button = make("button", "", ...entry.cells.slice(0, entry.branch ? 2 : 4));
    Object.assign(button, { type: "button", role: "tab" });
    button.setAttribute("aria-controls", "details");
    button.addEventListener("click", () => (open_stage(entry.id), $("stage").scrollIntoView({ block: "nearest" })));
    entry.button = button;
    const item = make("li", entry.branch ? "branch" : "", button);
    item.role = "presentation";
    $("diagram").append(item);
  }
}

// Up and down open the adjacent stage; Tab leaves the diagram.
function move_in_diagram(event) {
  const step = { ArrowUp: -1, ArrowDown: 1 }[event.key];
  const next = STAGES[STAGES.indexOf(stage()) + step];
  if (!next) return;
  event.preventDefault();
  open_stage(next.id);
  next.button.focus();
}

function open_stage(id) {
  inside.stage = id;
  for (const { button, ...entry } of STAGES) {
    button.setAttribute("aria-selected", entry.id === id);
    button.tabIndex = entry.id === id ? 0 : -1;
  }
  const { layer } = stage();
  if (layer === undefined) return show_details();
  $("layer").value = layer;
  choose_shade("attention");
  if (inside.position) look();
  else show_details();
}

function show_diagram() {
  const { trace, weights } = inside;
  const actual = trace && actual_id();
  for (const { shape, lens, id, cells } of STAGES) {
    const [, shape_cell, guess, surprise] = cells;
    shape_cell.textContent = shape(trace ? weights.length : "T");
    guess.textContent = surprise.textContent = "";
    if (!trace) continue;
    if (id === "guess" && actual !== null) guess.textContent = short(VOCABULARY.characters[actual]);
    if (lens === undefined) continue;
    const probabilities = softmax(trace.lens[lens]);
    const best = argmax(probabilities);
    guess.textContent = `${short(VOCABULARY.characters[best])}  ${percent(probabilities[best])}`;
    if (actual !== null) surprise.textContent = (-Math.log2(probabilities[actual])).toFixed(2);
  }
}

function show_details() {
  const { name, explain, show, layer } = stage();
  const { trace } = inside;
  $("stage").textContent = name;
  $("explanation").textContent = explain(trace !== null) + (trace ? "" : " Select a character to see its numbers.");
  $("attention").hidden = !trace || layer === undefined;
  $("guesses").hidden = !trace || show !== show_guess;
  $("vectors").replaceChildren();
  if (trace) show();
}

// A vector as a strip of colors with its numbers.
function show_vector(title, values) {
  const mean = values.reduce((sum, x) => sum + x, 0) / values.length;
  const deviation = Math.sqrt(values.reduce((sum, x) => sum + (x - mean) ** 2, 0) / values.length);
  const caption = `${title}: mean ${fixed(mean)}, standard deviation ${fixed(deviation)}`;
  const canvas = make("canvas");
  canvas.ariaHidden = "true";
  const [up, down, numbers] = [make("i", "up"), make("i", "down"), make("p", "numbers")];
  const all = make("details", "", make("summary", "", `All ${grouped(values.length)} numbers`), numbers);
  all.addEventListener("toggle", () => {
    numbers.textContent = Array.from(values, (x) => x.toFixed(4)).join("  ");
  });
  $("vectors").append(make("figure", "vector", make("figcaption", "", caption), canvas, up, down, all));
  const colors = [up, down].map(channels_of);
  const most = values.reduce((a, x) => Math.max(a, Math.abs(x)), 1e-9);
  paint(canvas, values.length, 1, (i) => [...colors[values[i] > 0 ? 0 : 1], (255 * Math.abs(values[i])) / most]);
}

const fixed = (x) => (Number(x.toFixed(2)) || 0).toFixed(2); // not -0.00

// The computed text color, as red, green and blue.
const channels_of = (element) => getComputedStyle(element).color.match(/[\d.]+/g).slice(0, 3).map(Number);

function paint(canvas, width, height, color) {
  Object.assign(canvas, { width, height });
  const context = canvas.getContext("2d");
  const image = context.createImageData(width, height);
  for (let i = 0; i < width * height; i++) image.data.set(color(i), 4 * i);
  context.putImageData(image, 0, 0);
}

const STRIP = " In the strips, each column is one number: orange is positive, blue negative.";

function explain_characters() {
  return (
    `The vocabulary has ${grouped(V)} characters, and each has an id. The network computes with ids only, and with ` +
    `at most ${grouped(DATA.config.block_size)} of them at once.`
  );
}

function show_characters() {
  const { first, weights } = inside;
  const from = Math.max(0, weights.length - 20);
  const shown = Array.from({ length: weights.length - from }, (_, i) => first + from + i);
  const rows = shown.map((position) => {
    const character = text.characters[position];
    return [position + 1, visible(character)[0], VOCABULARY.ids.get(character)];
  });
  const scroll = table("The last characters and their ids", ["position", "character", "id"], rows);
  $("vectors").append(scroll);
  scroll.scrollTop = scroll.scrollHeight;
}

function explain_embeddings() {
  const { position, ngrams, norm } = DATA.config;
  return (
    `Each id selects a row of ${grouped(C)} numbers from a table.` +
    (position === "learned" ? " Each position adds a row of a second table."
      : " Positions are not added: attention rotates queries and keys by an angle proportional to them.") +
    (ngrams ? " The last characters together (n-grams) select rows of further tables, by a hash of their ids." : "") +
    (norm === "plain" ? " The sum is normalized to mean 0 and variance 1." : " The sum enters the residual stream.") +
    STRIP
  ); // prettier-ignore
}

function show_embeddings() {
  const { trace, seen } = inside;
  for (const { table, index, vector } of trace.parts) {
    const last = typeof table === "number" ? table : 1;
    const name = text.characters.slice(Math.max(inside.first, seen - last), seen).map(short).join("");
    const title = table === "position" ? `Position in the context, row ${index}` : table === "token" ? `Character “${name}”, row ${index}`
      : `Last ${table} characters “${name}”, row ${grouped(index)}`; // prettier-ignore
    show_vector(title, vector);
  }
  show_lens(0, DATA.config.norm === "plain" ? "Sum, normalized" : "Sum");
}

function explain_lens() {
  return (
    "The residual stream: the embeddings plus the outputs of all blocks so far. Logit lens: the final norm and the " +
    "head applied here, as if this were the last block." + STRIP
  ); // prettier-ignore
}

function show_lens(index, title = "Residual stream") {
  const { trace } = inside;
  show_vector(title, index ? trace.blocks[index - 1].residual : trace.embeddings);
  const list = make("ol", "bars");
  list.ariaLabel = "The most likely next characters, by the logit lens";
  const probabilities = softmax(trace.lens[index]);
  const shown = with_actual(descending(trace.lens[index]).slice(0, 5));
  const most = probabilities[shown[0]];
  list.append(...shown.map((id) => bar(id, probabilities[id], null, most)));
  $("vectors").append(make("p", "quiet", "Prediction of the logit lens:"), list);
}

function explain_feed_forward() {
  const name = { relu: "ReLU", gelu: "GELU", relu2: "ReLU squared" }[DATA.config.activation];
  return (
    `Applied to each position separately: a norm, a linear layer from ${grouped(C)} to ${grouped(4 * C)} hidden ` +
    `units, ${name}, and a linear layer back to ${grouped(C)}. Its output is added to the residual stream.` + STRIP
  ); // prettier-ignore
}

function show_hidden(layer) {
  const { hidden, attention, residual } = inside.trace.blocks[layer];
  const before = layer ? inside.trace.blocks[layer - 1].residual : inside.trace.embeddings;
  const active = hidden.reduce((count, x) => count + (x > 0), 0);
  show_vector(`Hidden units, ${grouped(active)} of ${grouped(hidden.length)} above 0`, hidden);
  show_vector("Output, added to the residual stream", residual.map((x, c) => x - before[c] - attention[c]));
}

function explain_logits() {
  return (
    `The residual stream is normalized, and the head, a matrix of ${grouped(V)} rows, gives each character of the ` +
    "vocabulary a number, its logit. Softmax turns logits into probabilities: e^logit divided by the sum of e^logit."
  );
}

function show_logits() {
  const { logits } = inside;
  const probabilities = softmax(logits);
  const rows = descending(logits).slice(0, 100).map((id) => {
    const name = visible(VOCABULARY.characters[id])[0];
    return [name, logits[id].toFixed(3), number(Math.exp(logits[id])), probabilities[id].toFixed(4)];
  }); // prettier-ignore
  const scroll = table("Logits, most likely first", ["character", "logit", "e^logit", "probability"], rows);
  const total = logits.reduce((sum, logit) => sum + Math.exp(logit), 0);
  $("vectors").append(scroll, make("p", "quiet", `Sum of e^logit over all characters: ${number(total)}`));
}

// A table in a box that scrolls, also with the keyboard.
function table(name, heads, rows) {
  const row = (tag, cells) => make("tr", "", ...cells.map((cell) => make(tag, "", String(cell))));
  const body = make("tbody", "", ...rows.map((cells) => row("td", cells)));
  const scroll = make("div", "scroll", make("table", "", make("thead", "", row("th", heads)), body));
  for (const [key, value] of Object.entries({ tabindex: 0, role: "region", "aria-label": name }))
    scroll.setAttribute(key, value);
  return scroll;
}

// A number with four significant digits or more, whatever its size.
const number = (x) => {
  const size = Math.abs(x);
  return x === 0 ? "0" : size >= 1e5 || size < 1e-3 ? x.toExponential(3) : x.toFixed(size >= 100 ? 1 : 4);
};

// ---- guesses and sampling ----

function explain_guess(selected) {
  return selected
    ? "Outline: the network's probability; filled: after temperature, top-k and top-p; framed: the character in the " +
      "text. Click a guess to put that character here and continue from it."
    : "Softmax turns logits into probabilities; temperature, top-k and top-p change them, and one character is drawn. " +
      "The color of a character in the text shows its surprise in bits, -log2 of its predicted probability: 0 bits " +
      "means the network was certain, 1 bit is a coin toss, 3 bits one chance in eight."; // prettier-ignore
}

function with_actual(ids) {
  const actual = actual_id();
  return actual === null || ids.includes(actual) ? ids : [...ids, actual];
}

function show_guess() {
  const { logits } = inside;
  const [network, drawn] = [softmax(logits), probabilities_of(logits, settings())];
  const shown = with_actual(descending(logits).slice(0, BARS));
  const most = Math.max(network[shown[0]], ...shown.map((id) => drawn[id]));
  $("bars").replaceChildren(...shown.map((id) => bar(id, network[id], drawn[id], most, () => what_if(id))));
  show_drawn(drawn);
}

// A guess with its probability before and after the sampling settings (or null); `pick`: on a click.
function bar(id, network, drawn, most, pick = null) {
  const [name, is_code] = visible(VOCABULARY.characters[id]);
  const is_actual = id === actual_id();
  const share = (className, p) => style(make("i", className), { share: (p / most).toFixed(4) });
  const track = make("span", "bar", share(drawn === null ? "settings-share" : "network", network));
  if (drawn !== null) track.append(share("settings-share", drawn));
  track.ariaHidden = "true";
  const label = make("bdi", is_code ? "name code" : "name", name);
  const details = [
    drawn !== null && `${percent(network)} before sampling settings`, is_actual && "the character in the text",
    pick && "put it here and continue",
  ].filter(Boolean); // prettier-ignore
  const value = make("span", "percent", percent(drawn ?? network));
  const row = make(pick ? "button" : "div", "", label, track, value, make("span", "hidden", `, ${details.join(", ")}`));
  if (pick) {
    row.type = "button";
    row.addEventListener("click", pick);
    row.title = `network: ${percent(network)}; with sampling settings: ${percent(drawn)}`;
  }
  return make("li", is_actual ? "actual" : "", row);
}

// Continue the text with another character at the selected position.
function what_if(id) {
  const { seen } = inside;
  const number = attempt("seed", seed);
  const chosen = { ...settings(), seed: number };
  if (number === null || attempt("max_new_chars", () => check_form(chosen)) === null) return;
  const before = text.characters.slice(0, seen).map((character) => VOCABULARY.ids.get(character));
  const instead = seen < text.characters.length ? ` instead of ${quoted(text.characters[seen])}` : "";
  const note = `What if: ${quoted_id(id)}${instead} at character ${grouped(seen + 1)}. `;
  text.past.push({ ...text.request, position: seen });
  const start = Math.min(text.request.start, seen);
  run({ type: "write", prompt: [...before, id], settings: chosen, start, changed: seen, note });
  select(seen);
  $("text").focus({ preventScroll: true });
}

function undo() {
  const request = text.past.pop();
  run(request);
  text.reselect = request.position;
  $("text").focus({ preventScroll: true });
}

// The random number of this position, 0 to 1, on a bar of all probabilities side by side, in the order
// of ids: it picks the character in whose interval it is.
function show_drawn(drawn) {
  const chosen = settings();
  const point = chosen.temperature > 0 ? random_number() : null;
  $("cumulative").hidden = point === null;
  if (point === null) {
    const greedy = "At temperature 0 the most likely character is taken; no random number is used.";
    $("drawn").textContent = chosen.temperature === 0 ? greedy : "";
    return;
  }
  const picked = sample(inside.logits, chosen, point);
  const total = drawn.reduce((a, b) => a + b, 0);
  const ends = [];
  drawn.forEach((probability, id) => (ends[id] = (ends[id - 1] ?? 0) + probability / total));
  const segments = [...ends.keys()].map((id) => {
    const share = drawn[id] / total;
    const name = share > 0.05 ? short(VOCABULARY.characters[id]) : "";
    return style(make("i", id === picked ? "picked" : "", name), { from: ends[id] - share, share });
  });
  const wide = segments.filter((_, id) => drawn[id] / total > 0.002);
  $("cumulative").replaceChildren(...wide, style(make("b"), { from: point }));
  const interval = `${quoted_id(picked)} (${(ends[picked - 1] ?? 0).toFixed(4)} to ${ends[picked].toFixed(4)})`;
  $("drawn").textContent = describe_drawn(point.toFixed(4), picked, interval);
}

function random_number() {
  try {
    return uniform(text.request.settings?.seed ?? seed(), 0, inside.seen);
  } catch {
    return null; // the seed typed for a scored text is not a number
  }
}

function describe_drawn(point, picked, interval) {
  const { type, start, changed } = text.request;
  const { seen } = inside;
  if (seen === changed) return `You put this character here. The random number ${point} would have picked ${interval}.`;
  if (type === "score" || seen < start)
    return `This character was not sampled. The random number would have been ${point}, which picks ${interval}.`;
  if (actual_id() === null || picked === actual_id())
    return `The random number is ${point}, which is in the interval of ${interval}.`;
  return `The random number is ${point}; with the current settings it would pick ${interval}.`;
}

// ---- attention ----

const shaded = []; // the characters with an attention weight

function show_attention() {
  const { weights, first, seen, trace } = inside;
  for (const span of shaded.splice(0)) span.style.removeProperty("--weight");
  mark("from", trace ? seen - 1 : null);
  const most = weights.reduce((a, b) => Math.max(a, b), 0);
  weights.forEach((weight, i) => {
    const span = text.spans[first + i];
    span.style.setProperty("--weight", (weight / most).toFixed(3));
    shaded.push(span);
  });
}

function explain_attention() {
  return (
    "Each head compares the query of a position with the keys of that position and all earlier ones. Softmax turns " +
    "the scores into weights, and the head outputs the weighted average of the values." +
    (DATA.config.position === "rotary" ? " Queries and keys are rotated by an angle proportional to their position." : "")
  );
}

function show_attention_numbers(layer) {
  const { weights, first, trace } = inside;
  const named = descending(weights).slice(0, 3).map((i) =>
    `${quoted(text.characters[first + i])} (character ${first + i + 1}, ${percent(weights[i])})`); // prettier-ignore
  const who = $("head").value === "mean" ? "The heads of this layer" : "This head";
  $("looked").textContent =
    `The network predicts the selected character at the position before it (dotted in the text). ${who} attended most ` +
    `to ${named.join(", ")}. The context had ${grouped(weights.length)} ${weights.length === 1 ? "character" : "characters"}.`;
  if (trace.maps) show_maps(trace.maps);
  $("cell").textContent = "Row: the position that attends; column: the one it attends to. Click a row to select what it predicts.";
  show_product();
  show_vector("Output of all heads, added to the residual stream", trace.blocks[layer].attention);
}

function show_maps({ from, n, weights }) {
  const row = inside.seen - 1 - from;
  inside.until = from + n - 1;
  const small = $("head").value === "mean" ? (H === 4 ? 2 : H) : H - 1; // maps beside each other
  style($("maps"), { columns: Math.max(1, Math.min(3, small)) });
  const maps = Array.from({ length: H }, (_, head) => {
    const button = make("button", "", `Head ${head + 1}`);
    button.type = "button";
    button.setAttribute("aria-pressed", $("head").value === String(head));
    button.addEventListener("click", () => choose_head(head));
    const canvas = make("canvas");
    canvas.role = "img";
    canvas.ariaLabel = `Attention weights of head ${head + 1} among characters ${from + 1} to ${from + n}`;
    const box = style(make("div", "", canvas, style(make("i"), { row: row / n })), { size: 1 / n });
    box.head = head;
    return make("div", $("head").value === String(head) ? "map chosen" : "map", button, box);
  });
  const focused = [...$("maps").children].findIndex((map) => map.contains(document.activeElement));
  $("maps").replaceChildren(...maps);
  if (focused >= 0) maps[focused].querySelector("button").focus(); // not lost with the replaced button
  const color = channels_of(maps[0].querySelector("canvas"));
  maps.forEach((map, head) =>
    paint(map.querySelector("canvas"), n, n, (i) => [...color, 255 * Math.sqrt(weights[head * n * n + i])]),
  );
}

// The cell of a map under the pointer: its head, and the positions of its query and key.
function cell_at(event) {
  const box = event.target.closest(".map div");
  if (!box || !inside.trace?.maps) return null;
  const { left, top, width, height } = box.getBoundingClientRect();
  const { from, n, weights } = inside.trace.maps;
  const inner = (x) => Math.max(0, Math.min(n - 1, Math.floor(x * n)));
  const [row, column] = [inner((event.clientY - top) / height), inner((event.clientX - left) / width)];
  const weight = weights[(box.head * n + row) * n + column];
  return { head: box.head, query: from + row, key: from + column, weight };
}

function name_cell(event) {
  const found = cell_at(event);
  if (!found) return;
  const { head, query, key, weight } = found;
  const name = (position) => `${quoted(text.characters[position])} (${position + 1})`;
  $("cell").textContent = `Head ${head + 1}, at ${name(query)}: ` +
    (key > query ? "later characters are masked" : `weight ${weight.toFixed(4)} for ${name(key)}`); // prettier-ignore
}

function choose_cell(event) {
  const found = cell_at(event);
  if (!found) return;
  $("head").value = found.head;
  inside.key = found.key > found.query ? null : found.key;
  choose_shade("attention");
  select(found.query + 1);
}

function choose_head(head) {
  $("head").value = head;
  choose_shade("attention");
  if (inside.position) look();
}

// Query times key of one head and one pair of characters, down to the attention weight.
function show_product() {
  const { trace: { pair }, first, seen, weights } = inside; // prettier-ignore
  $("product").hidden = !pair;
  if (!pair) return;
  const { query, keys } = pair;
  if (inside.key === null || inside.key < first || inside.key >= seen) inside.key = first + argmax(weights);
  const key = keys[inside.key - first];
  Object.assign($("key"), { min: first + 1, max: seen, value: inside.key + 1 });
  const rows = Array.from(query, (q, d) => [d + 1, q.toFixed(4), key[d].toFixed(4), (q * key[d]).toFixed(4)]);
  const heads = ["channel", "query", "key", "product"];
  $("products").replaceChildren(table("The products, channel by channel", heads, rows));
  $("weight").textContent = describe_weight(query, keys, inside.key - first);
  for (const mark of $("maps").querySelectorAll("i.key")) mark.remove();
  const { from, n } = trace_maps();
  const box = $("maps").children[Number($("head").value)]?.querySelector("div");
  if (box && inside.key >= from)
    box.append(style(make("i", "key"), { row: (seen - 1 - from) / n, column: (inside.key - from) / n }));
}

// From the dot product of the query and one of the keys to its weight.
function describe_weight(query, keys, index) {
  const { first, seen } = inside;
  const dots = keys.map((key) => query.reduce((sum, q, d) => sum + q * key[d], 0));
  const scores = dots.map((dot) => dot / Math.sqrt(query.length));
  const total = scores.reduce((sum, score) => sum + Math.exp(score), 0);
  const name = (position) => `${quoted(text.characters[position])} (${position + 1})`;
  return (
    `The query of ${name(seen - 1)} and the key of ${name(first + index)}: their dot product, the sum of the products, ` +
    `is ${number(dots[index])}. Divided by √${query.length}, it gives the score ${number(scores[index])}. e^score is ` +
    `${number(Math.exp(scores[index]))}; divided by the sum of e^score over all ${grouped(keys.length)} characters of ` +
    `the context, ${number(total)}, it gives the weight ${softmax(scores)[index].toFixed(4)}.`
  );
}

const trace_maps = () => inside.trace.maps || { from: Infinity, n: 1 };

// ---- shading ----

function choose_shade(value) {
  document.querySelector(`input[name=shade][value=${value}]`).checked = true;
  show_shade();
}

function show_shade() {
  const shade = document.querySelector("input[name=shade]:checked").value;
  $("text").dataset.shade = shade;
  const scale = make("span", `scale ${shade}`);
  $("legend").replaceChildren(
    ...{
      surprise: ["0", scale, `${MOST_BITS} bits or more. Italic: your prompt.`],
      attention: ["none", scale, "most attention of the selected character"],
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
    "The same prompt, seed and settings give the same text here and in “python -m chargpt predict”" +
    (DATA.weights.dtype === "float16" ? ", except where rounding the weights to float16 changes it." : ".");
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
  fill_diagram();
  forget();
  open_stage("guess");
  show_inside();
  show_settings();
  show_shade();
  const on = (id, event, handler) => $(id).addEventListener(event, handler);
  const write_in_view = () => (write(), $("text").scrollIntoView({ block: "nearest" }));
  on("form", "submit", (event) => (event.preventDefault(), $("write").disabled || write_in_view()));
  on("form", "input", () => (show_settings(), save_soon()));
  on("prompt", "keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && !$("write").disabled) write_in_view();
  });
  on("text", "scroll", note_scroll);
  const close = () => (clear_selection(), $("text").focus());
  on("close", "click", close);
  on("inside", "keydown", (event) => event.key === "Escape" && close());
  on("score", "click", score);
  on("stop", "click", () => ask("stop"));
  on("another", "click", () => {
    const number = attempt("seed", seed);
    if (number === null) return;
    $("seed").value = String(number + 1n);
    show_settings();
    write();
  });
  on("copy", "click", copy);
  on("text", "click", (event) => event.target.position !== undefined && select(event.target.position));
  on("text", "keydown", on_key);
  on("position", "change", () => $("position").value && select($("position").valueAsNumber - 1));
  on("undo", "click", undo);
  on("diagram", "keydown", move_in_diagram);
  on("layer", "change", () => open_stage(`attention ${$("layer").value}`));
  on("head", "change", () => choose_head($("head").value));
  on("key", "change", () => {
    inside.key = $("key").value ? $("key").valueAsNumber - 1 : null;
    if (inside.trace) show_product();
  });
  on("maps", "pointermove", name_cell);
  on("maps", "click", choose_cell);
  for (const query of ["(prefers-color-scheme: dark)", "(forced-colors: active)"])
    matchMedia(query).addEventListener("change", show_inside); // canvases are painted with the colors in use
  for (const radio of document.querySelectorAll("input[name=shade]")) radio.addEventListener("change", show_shade);
  document.querySelector("input[value=attention]").addEventListener("change", () => open_stage(`attention ${$("layer").value}`));
  const base64 = $("weights").textContent;
  $("weights").remove(); // the worker has its own copy
  const { config, weights, example } = DATA;
  ask("load", { config, vocab_size: VOCABULARY.characters.length, weights, base64, example });
}

start();
