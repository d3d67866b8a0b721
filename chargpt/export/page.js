"use strict";
// The model and generation, as in chargpt/model and generation.py: the same names in the same order,
// documented there. One text at a time, without dropout.
//
//     T  positions processed at once     C  channels (n_embd)     D  channels per head
//     S  positions attended to           H  attention heads       V  vocabulary size
//
// Arrays are flat: (T, C) is a Float32Array of T * C numbers in row-major order.

const CHUNK = 64; // maximum number of positions processed at once

// ---- chargpt/model ----

// erfc with a relative error below 1.2e-7 everywhere (Numerical Recipes, 6.2.2)
const ERFC = [
  -1.26551223, 1.00002368, 0.37409196, 0.09678418, -0.18628806, 0.27886807, -1.13520398, 1.48851587,
  -0.82215223, 0.17087277,
];

function erfc(x) {
  const t = 1 / (1 + Math.abs(x) / 2);
  let sum = 0;
  for (let i = 9; i >= 0; i--) sum = sum * t + ERFC[i];
  const tail = t * Math.exp(sum - x * x);
  return x < 0 ? 2 - tail : tail;
}

const ACTIVATIONS = {
  relu: (x) => Math.max(x, 0),
  gelu: (x) => (x * erfc(-x / Math.SQRT2)) / 2,
  relu2: (x) => (x > 0 ? x * x : 0),
};

class LayerNorm {
  constructor(C, weight, bias) {
    Object.assign(this, { C, weight: weight?.values, bias: bias?.values });
  }

  forward(x, T) {
    const { C, weight, bias } = this;
    const y = new Float32Array(T * C);
    for (let t = 0; t < T; t++) {
      const row = x.subarray(t * C, (t + 1) * C);
      let [sum, squares] = [0, 0];
      for (let c = 0; c < C; c++) sum += row[c];
      const mean = sum / C;
      for (let c = 0; c < C; c++) squares += (row[c] - mean) ** 2;
      const scale = 1 / Math.sqrt(squares / C + 1e-5);
      for (let c = 0; c < C; c++) {
        const normalized = (row[c] - mean) * scale;
        y[t * C + c] = weight ? normalized * weight[c] + bias[c] : normalized;
      }
    }
    return y;
  }
}

const NORMS = {
  layer: (C, weights, name) => new LayerNorm(C, weights[name + ".weight"], weights[name + ".bias"]),
  plain: (C) => new LayerNorm(C),
};

class Linear {
  constructor(weights, name) {
    Object.assign(this, { weights, weight: weights[name + ".weight"] });
    this.bias = weights[name + ".bias"]?.values;
  }

  // y = x W^T + b, (T, I) -> (T, O)
  forward(x, T) {
    const { rows: O, columns: I, stride, values } = this.weight;
    const { kernel, input, output } = this.weights;
    for (let t = 0; t < T; t++) {
      input.set(x.subarray(t * I, (t + 1) * I), t * stride);
      input.fill(0, t * stride + I, (t + 1) * stride);
    }
    kernel.multiply(input, values, output, T, stride, padded(O));
    const y = new Float32Array(T * O);
    for (let t = 0; t < T; t++) {
      y.set(output.subarray(t * padded(O), t * padded(O) + O), t * O);
      if (this.bias) for (let o = 0; o < O; o++) y[t * O + o] += this.bias[o];
    }
    return y;
  }
}

class Embedding {
  constructor(weights, name) {
    this.weight = weights[name + ".weight"];
  }

  // Add the embedding of `index` to `row`.
  add_to(row, index) {
    const { values, stride } = this.weight;
    for (let c = 0; c < row.length; c++) row[c] += values[index * stride + c];
  }
}

// Cosine and sine of each channel pair for positions first ... first + T - 1, (T, D / 2, 2).
// Rounded to float32 where PyTorch rounds: an angle of 1,000 radians has few digits after the point.
function rotary_angles(first, T, D) {
  const angles = new Float32Array(T * D);
  for (let pair = 0; pair < D; pair += 2) {
    const frequency = Math.fround(10_000 ** -Math.fround(pair / D));
    for (let t = 0; t < T; t++) {
      const angle = Math.fround((first + t) * frequency);
      angles[t * D + pair] = Math.cos(angle);
      angles[t * D + pair + 1] = Math.sin(angle);
    }
  }
  return angles;
}

// Rotate all heads of one query or key, (H, D), in place by the angles of its position, (D).
function apply_rotary(x, angles) {
  const D = angles.length;
  for (let i = 0; i < x.length; i += 2) {
    const [a, b, cos, sin] = [x[i], x[i + 1], angles[i % D], angles[(i % D) + 1]];
    x[i] = a * cos - b * sin;
    x[i + 1] = a * sin + b * cos;
  }
}

// The keys and values of one context, up to block_size positions. Queries and logits are not needed
// for generation; they are stored for display.
class KVCache {
  constructor(gpt) {
    const { n_layer, n_embd: C, block_size } = gpt.config;
    const slots = () => new Float32Array(block_size * C);
    const layer = () => ({ queries: slots(), keys: slots(), values: slots() });
    this.layers = Array.from({ length: n_layer }, layer);
    this.logits = new Float32Array(block_size * gpt.vocab_size);
    this.length = 0;
    this.newest_ids = FACTORS.slice(1).fill(0); // the context of the longest n-gram
  }

  append_ids(ids) {
    const context_ids = this.newest_ids;
    this.newest_ids = [...context_ids, ...ids].slice(-context_ids.length);
    return context_ids;
  }
}

class MultiHeadAttention {
  constructor(config, weights, name) {
    Object.assign(this, { C: config.n_embd, n_head: config.n_head });
    this.qkv = new Linear(weights, name + ".qkv");
    this.projection = new Linear(weights, name + ".projection");
  }

  forward(x, T, angles, cache, length) {
    const { C, n_head } = this;
    const D = C / n_head;
    const qkv = this.qkv.forward(x, T); // (T, 3, H, D)
    const y = new Float32Array(T * C);
    for (let t = 0; t < T; t++) {
      const [q, k, v] = [0, 1, 2].map((n) => qkv.subarray((3 * t + n) * C, (3 * t + n + 1) * C));
      if (angles) {
        apply_rotary(q, angles.subarray(t * D, (t + 1) * D));
        apply_rotary(k, angles.subarray(t * D, (t + 1) * D));
      }
      const position = length + t;
      cache.queries.set(q, position * C);
      cache.keys.set(k, position * C);
      cache.values.set(v, position * C);
      for (let head = 0; head < n_head; head++) {
        const weights = attention_weights(cache, head, position, C, D); // (S)
        gather(cache.values, weights, head, C, D, y.subarray(t * C + head * D));
      }
    }
    return this.projection.forward(y, T);
  }
}

// softmax(q k^T / sqrt(D)) of one head at one position: its weights over positions 0 to itself, (S).
function attention_weights({ queries, keys }, head, position, C, D) {
  const weights = new Float64Array(position + 1);
  const q = queries.subarray(position * C + head * D, position * C + (head + 1) * D);
  const scale = 1 / Math.sqrt(D);
  let highest = -Infinity;
  for (let s = 0; s <= position; s++) {
    let k = s * C + head * D;
    let [d, even, odd] = [0, 0, 0];
    for (; d + 1 < D; d += 2, k += 2) {
      even += q[d] * keys[k];
      odd += q[d + 1] * keys[k + 1];
    }
    if (d < D) even += q[d] * keys[k];
    weights[s] = (even + odd) * scale;
    if (weights[s] > highest) highest = weights[s];
  }
  let total = 0;
  for (let s = 0; s <= position; s++) total += weights[s] = Math.exp(weights[s] - highest);
  for (let s = 0; s <= position; s++) weights[s] /= total;
  return weights;
}

// Add the weighted sum of one head's values to y (D).
function gather(values, weights, head, C, D, y) {
  const [S, first] = [weights.length, head * D];
  let s = 0;
  for (; s + 3 < S; s += 4) {
    const [a, b, c, d] = [weights[s], weights[s + 1], weights[s + 2], weights[s + 3]];
    let at = s * C + first;
    for (let i = 0; i < D; i++, at++) {
      y[i] += a * values[at] + b * values[at + C] + c * values[at + 2 * C] + d * values[at + 3 * C];
    }
  }
  for (; s < S; s++) for (let i = 0; i < D; i++) y[i] += weights[s] * values[s * C + first + i];
}

class FeedForward {
  constructor(config, weights, name) {
    this.activation = ACTIVATIONS[config.activation];
    this.expansion = new Linear(weights, name + ".expansion");
    this.projection = new Linear(weights, name + ".projection");
  }

  forward(x, T, trace) {
    const y = this.expansion.forward(x, T);
    const { activation } = this;
    for (let i = 0; i < y.length; i++) y[i] = activation(y[i]);
    trace?.(y);
    return this.projection.forward(y, T);
  }
}

class Block {
  constructor(config, weights, name) {
    const make_norm = NORMS[config.norm];
    this.attention_norm = make_norm(config.n_embd, weights, name + ".attention_norm");
    this.attention = new MultiHeadAttention(config, weights, name + ".attention");
    this.feed_forward_norm = make_norm(config.n_embd, weights, name + ".feed_forward_norm");
    this.feed_forward = new FeedForward(config, weights, name + ".feed_forward");
  }

  // `trace`, if given, is called with the output of attention, the hidden units, and x after the block.
  forward(x, T, angles, cache, length, trace) {
    const y = this.attention.forward(this.attention_norm.forward(x, T), T, angles, cache, length);
    trace?.(y);
    x = add(x, y);
    x = add(x, this.feed_forward.forward(this.feed_forward_norm.forward(x, T), T, trace));
    trace?.(x);
    return x;
  }
}

const add = (x, y) => {
  for (let i = 0; i < x.length; i++) x[i] += y[i];
  return x;
};

const FACTORS = [36313, 27191, 51749, 43987, 60493];

class NgramEmbedding {
  constructor(ngrams, weights, name) {
    this.ngrams = ngrams; // {"3": 8192}; JavaScript iterates over integer keys in ascending order
    this.table = new Embedding(weights, name + ".table");
  }

  // The table rows of the n-grams that end at ids[at].
  rows_of(ids, at) {
    let first = 0;
    return Object.entries(this.ngrams).map(([n, rows]) => {
      const factors = FACTORS.slice(0, n);
      const hashed = factors.reduce((sum, factor, i) => sum + factor * ids[at - i], 0);
      first += rows;
      return first - rows + (hashed % rows);
    });
  }

  add_to(row, ids, at) {
    for (const index of this.rows_of(ids, at)) this.table.add_to(row, index);
  }
}

class GPT {
  constructor(config, vocab_size, weights) {
    const { n_embd: C, ngrams, position, norm, n_layer } = config;
    Object.assign(this, { config, vocab_size });
    this.token_embedding = new Embedding(weights, "token_embedding");
    this.position_embedding = position === "learned" && new Embedding(weights, "position_embedding");
    this.ngram_embedding = ngrams && new NgramEmbedding(ngrams, weights, "ngram_embedding");
    this.embedding_norm = norm === "plain" ? NORMS.plain(C) : { forward: (x) => x };
    this.blocks = Array.from({ length: n_layer }, (_, i) => new Block(config, weights, `blocks.${i}`));
    this.norm = NORMS[norm](C, weights, "norm");
    this.head = new Linear(weights, "head");
  }

  // Logits (T, V) of the next character at each position, for up to CHUNK ids. `trace`, if given, is
  // called with the embeddings and then by each block.
  forward(ids, cache, trace) {
    const [T, C, length] = [ids.length, this.config.n_embd, cache.length];
    if (length + T > this.config.block_size) {
      const { block_size } = this.config;
      throw new Error(`the input has ${length + T} characters, but block_size is ${block_size}`);
    }
    const context_ids = cache.append_ids(ids);
    const whole = [...context_ids, ...ids];
    let x = new Float32Array(T * C);
    for (let t = 0; t < T; t++) {
      const row = x.subarray(t * C, (t + 1) * C);
      this.token_embedding.add_to(row, ids[t]);
      if (this.position_embedding) this.position_embedding.add_to(row, length + t);
      if (this.ngram_embedding) this.ngram_embedding.add_to(row, whole, context_ids.length + t);
    }
    x = this.embedding_norm.forward(x, T);
    trace?.(x);
    const rotary = !this.position_embedding;
    const angles = rotary && rotary_angles(length, T, C / this.config.n_head);
    this.blocks.forEach((block, layer) => {
      x = block.forward(x, T, angles, cache.layers[layer], length, trace);
    });
    const logits = this.read(x, T);
    cache.logits.set(logits, length * this.vocab_size);
    cache.length += T;
    return logits;
  }

  // Logits (T, V) from the residual stream (T, C).
  read(x, T) {
    return this.head.forward(this.norm.forward(x, T), T);
  }
}

// Throw an error unless the network computes the logits of an example that PyTorch has computed: the
// network may have been changed in Python alone.
function check_example(gpt, { ids, logits }) {
  const { config, vocab_size } = gpt;
  const cache = new KVCache({ config: { ...config, block_size: ids.length }, vocab_size });
  const computed = gpt.forward(ids, cache).slice(-vocab_size);
  const tolerance = logits.reduce((most, logit) => Math.max(most, Math.abs(logit)), 1) / 1000;
  if (!logits.every((logit, id) => Math.abs(logit - computed[id]) <= tolerance))
    throw new Error("this page does not compute what its network computes in Python");
}

// ---- weights, in the format that page.py writes ----

// base64 -> {name: {rows, columns, stride, values}}; float16 or float32, one matrix after another.
function read_weights(base64, { dtype, shapes }, simd = true) {
  const text = atob(base64);
  const bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  const numbers = dtype === "float16" ? half_to_float(bytes.buffer) : new Float32Array(bytes.buffer);
  const size = (rows, columns) => padded(rows) * padded(columns);
  const multiplied = shapes.filter(([name]) => !name.includes("embedding"));
  const widest = padded(Math.max(...multiplied.flatMap(([, rows, columns]) => [rows, columns])));
  const floats = shapes.reduce((sum, [, rows, columns]) => sum + size(rows, columns), 0);
  const kernel = new Kernel(floats + 2 * CHUNK * widest, simd);
  const weights = { kernel };
  let start = 0;
  for (const [name, rows, columns] of shapes) {
    const [stride, values] = [padded(columns), kernel.allocate(size(rows, columns))];
    for (let row = 0; row < rows; row++, start += columns) {
      values.set(numbers.subarray(start, start + columns), row * stride);
    }
    weights[name] = { rows, columns, stride, values };
  }
  weights.input = kernel.allocate(CHUNK * widest);
  weights.output = kernel.allocate(CHUNK * widest);
  return weights;
}

// Convert float16 to float32 with a lookup table of all 65,536 values.
function half_to_float(buffer) {
  const table = new Float32Array(65536);
  for (let half = 0; half < 65536; half++) {
    const [sign, exponent, fraction] = [half >> 15 ? -1 : 1, (half >> 10) & 31, half & 1023];
    table[half] = sign * (exponent ? 2 ** (exponent - 25) * (1024 + fraction) : 2 ** -24 * fraction);
  }
  return new Float32Array(new Uint16Array(buffer)).map((half) => table[half]);
}

// ---- vocabulary.py ----

const MAX_NAMED = 10;

class Vocabulary {
  // Code points, since two adjacent lone surrogates would merge into one character in a string;
  // stand_ins: for characters that older texts lack, what they use instead.
  constructor(code_points, stand_ins) {
    this.characters = code_points.map((code) => String.fromCodePoint(code));
    this.stand_ins = stand_ins;
    this.ids = new Map(this.characters.map((character, id) => [character, id]));
  }

  get opening() {
    return this.ids.has("\n") ? "\n" : this.characters[0];
  }

  encode(text) {
    const characters = Array.from(text);
    if (!characters.every((character) => this.ids.has(character))) throw new Error(this.describe_unknown(characters));
    return characters.map((character) => this.ids.get(character));
  }

  describe_unknown(text) {
    const unknown = [...new Set(text)].filter((character) => !this.ids.has(character));
    const named = unknown.slice(0, MAX_NAMED).map((character) => this.describe(character, text.indexOf(character)));
    if (unknown.length > MAX_NAMED) named.push(`and ${grouped(unknown.length - MAX_NAMED)} more`);
    return (
      `unknown character${unknown.length > 1 ? "s" : ""} ${named.join("; ")} (positions count from 0; ` +
      `the vocabulary has ${grouped(this.characters.length)} characters)`
    );
  }

  describe(character, position) {
    const nearest = this.nearest(character).map(repr).join(" or ");
    const hint = nearest && `, nearest known: ${nearest}`;
    const shown = is_combining(character) ? `'${escaped(character)}'` : repr(character);
    return `${shown} (${code_name(character)}) at position ${position}${hint}`;
  }

  nearest(character) {
    const stand_ins = this.stand_ins[character] ?? "";
    const [bare] = character.normalize("NFKD");
    const candidates = [swapcase(character), ...stand_ins, bare, swapcase(bare)];
    return [...new Set(candidates)].filter((candidate) => this.ids.has(candidate));
  }
}

const grouped = (number) => number.toLocaleString("en-US");

const swapcase = (text) =>
  text === text.toLowerCase() ? text.toUpperCase() : text.toLowerCase();

const code_name = (character) =>
  "U+" + character.codePointAt(0).toString(16).toUpperCase().padStart(4, "0");

// Python's repr() and ascii() of one character.
function repr(character) {
  if (character === "'") return `"'"`;
  const printable = character === " " || !/[\p{C}\p{Z}]/u.test(character);
  return `'${printable && character !== "\\" ? character : escaped(character)}'`;
}

function escaped(character) {
  const short = { "\n": "\\n", "\r": "\\r", "\t": "\\t", "\\": "\\\\" }[character];
  const code = character.codePointAt(0);
  const digits = (letter, n) => `\\${letter}${code.toString(16).padStart(n, "0")}`;
  return short ?? (code < 0x100 ? digits("x", 2) : code < 0x10000 ? digits("u", 4) : digits("U", 8));
}

// Normalization reorders combining characters by class and leaves others in place. So a combining
// character swaps with a class 240 character before it or a class 1 character after it.
function is_combining(character) {
  const [first] = character.normalize("NFD");
  return ["\u0345" + first, first + "\u0334"].some((text) => text.normalize("NFD") !== text);
}

// ---- generation.py ----

// Error messages are those of GenerationConfig.
function check_settings({ max_new_chars, temperature, top_k, top_p }) {
  if (!(Number.isInteger(max_new_chars) && max_new_chars >= 0))
    throw new Error(`max_new_chars is ${max_new_chars}; it must be a whole number of at least 0`);
  if (!(temperature >= 0 && temperature < Infinity))
    throw new Error(`temperature is ${temperature}; it must be 0 or a positive number`);
  if (top_k !== null && !(Number.isInteger(top_k) && top_k >= 1))
    throw new Error(`top_k is ${top_k}; it must be a whole number of at least 1`);
  if (top_p !== null && !(top_p > 0 && top_p <= 1))
    throw new Error(`top_p is ${top_p}; it must be greater than 0 and at most 1`);
}

// A random number in [0, 1) as a function of its arguments; seed is a BigInt, of which the lowest
// 64 bits are used.
function uniform(seed, sample, position) {
  let bits = mix(position);
  for (const word of [sample, BigInt.asUintN(32, seed), BigInt.asUintN(32, seed >> 32n)])
    bits = mix(bits ^ Number(word));
  return bits / 2 ** 32;
}

function mix(bits) {
  bits = (bits + 0x9e3779b9) >>> 0;
  bits = Math.imul(bits ^ (bits >>> 16), 0x7feb352d);
  bits = Math.imul(bits ^ (bits >>> 15), 0x846ca68b);
  return (bits ^ (bits >>> 16)) >>> 0;
}

function softmax(logits) {
  let [highest, total] = [-Infinity, 0];
  for (const logit of logits) highest = Math.max(highest, logit);
  const probabilities = Float64Array.from(logits, (logit) => Math.exp(logit - highest));
  for (const probability of probabilities) total += probability;
  return probabilities.map((probability) => probability / total);
}

const descending = (numbers) =>
  Array.from(numbers.keys()).sort((a, b) => numbers[b] - numbers[a] || a - b);

const argmax = (numbers) => numbers.reduce((best, n, i) => (n > numbers[best] ? i : best), 0);

// The probability of each id, (V), after temperature, top-k and top-p.
function probabilities_of(logits, { temperature, top_k, top_p }) {
  if (temperature === 0) {
    const best = argmax(logits);
    return Float64Array.from(logits, (_, id) => (id === best ? 1 : 0));
  }
  const nucleus = top_p !== null && top_p < 1;
  const sorted_ids = top_k !== null || nucleus ? descending(logits) : [];
  const highest = logits.reduce((a, b) => Math.max(a, b), -Infinity);
  const scaled = Float64Array.from(logits, (logit) => (logit - highest) / temperature);
  if (top_k !== null) for (const id of sorted_ids.slice(top_k)) scaled[id] = -Infinity;
  const probabilities = softmax(scaled);
  if (nucleus) {
    let cumulative = 0;
    for (const id of sorted_ids) {
      const probability = probabilities[id];
      cumulative += probability;
      if (cumulative - probability >= top_p) probabilities[id] = 0;
    }
  }
  return probabilities;
}

function sample(logits, config, uniform) {
  if (config.temperature === 0) return argmax(logits);
  let total = 0;
  const cumulative = probabilities_of(logits, config).map((probability) => (total += probability));
  return cumulative.findIndex((sum) => sum / total > uniform);
}

function window_length(length, block_size) {
  if (length <= block_size) return length;
  const min_window = (block_size + 1) >> 1;
  return min_window + ((length - block_size - 1) % (block_size - min_window + 1));
}

// Continue a prompt. Yields after each step the new ids, the cache used and the position of its first
// character. During prefill it yields without new ids, so that the worker can handle messages.
function* generate(gpt, prompt, config, which = 0) {
  const { block_size } = gpt.config;
  const min_window = window_length(block_size + 1, block_size);
  let window = prompt.slice(-window_length(prompt.length, block_size));
  let length = prompt.length;
  let cache = new KVCache(gpt);
  const chunk = (ids) => ({ ids, cache, first: length - window.length });
  if (config.max_new_chars === 0) return;
  for (const _ of prefill(gpt, cache, window.slice(0, -1))) yield chunk([]);
  for (let left = config.max_new_chars; left > 0; left--) {
    const logits = gpt.forward(window.slice(-1), cache);
    const id = sample(logits, config, uniform(config.seed, which, length));
    length += 1;
    window.push(id);
    yield chunk([id]);
    if (window.length > block_size && left > 1) {
      window = window.slice(-min_window);
      cache = new KVCache(gpt);
      for (const _ of prefill(gpt, cache, window.slice(0, -1))) yield chunk([]);
    }
  }
}

// Process the ids that are not in the cache yet. Yields after each chunk.
function* prefill(gpt, cache, ids) {
  while (cache.length < ids.length) {
    gpt.forward(ids.slice(cache.length, cache.length + CHUNK), cache);
    yield;
  }
}

// ---- inspection, as in inspection.py and TextGenerator.score ----

const MAP = 64; // characters in a map of attention weights
const PASSAGES_BYTES = 2 ** 28; // of stored caches; others are recomputed

// A text with the network's internals: windows of up to block_size characters, each with its own
// KVCache. A generated text has the windows it was generated with; a scored text is cut as
// TextGenerator.score cuts it, so that the mean loss is the same.
class Reading {
  constructor(gpt, ids, generated) {
    const { n_layer, n_embd, block_size } = gpt.config;
    Object.assign(this, { gpt, ids, generated, passages: new Map() });
    const bytes = 4 * block_size * (3 * n_layer * n_embd + gpt.vocab_size);
    this.most = Math.max(2, Math.floor(PASSAGES_BYTES / bytes));
  }

  // The start of the context from which the character at `position` is predicted.
  first_of(position) {
    const { block_size } = this.gpt.config;
    if (this.generated) return position - window_length(position, block_size);
    return Math.floor((position - 1) / block_size) * block_size;
  }

  remember(first, cache) {
    this.passages.delete(first); // insert it as the most recent
    this.passages.set(first, cache);
    if (this.passages.size > this.most) this.passages.delete(this.passages.keys().next().value);
  }

  // Compute until the character at `position` is predicted; yields after each chunk.
  *reach(position) {
    const first = this.first_of(position);
    const cache = this.passages.get(first) ?? new KVCache(this.gpt);
    this.remember(first, cache);
    for (const _ of prefill(this.gpt, cache, this.ids.slice(first, position))) yield;
    return cache;
  }

  logits(cache, position) {
    const row = position - 1 - this.first_of(position);
    return cache.logits.subarray(row * this.gpt.vocab_size, (row + 1) * this.gpt.vocab_size);
  }

  // Losses in nats of the characters at positions from ... to - 1, all in one window.
  losses(cache, from, to) {
    const losses = [];
    for (let position = from; position < to; position++)
      losses.push(cross_entropy(this.logits(cache, position), this.ids[position]));
    return losses;
  }

  // Attention weights of the position before `position`: of one head, or the mean of all heads.
  attention(cache, position, layer, head) {
    const { n_embd: C, n_head } = this.gpt.config;
    const row = position - 1 - this.first_of(position);
    const heads = head === null ? Array.from({ length: n_head }, (_, i) => i) : [head];
    const weights = heads.map((h) => attention_weights(cache.layers[layer], h, row, C, C / n_head));
    return weights[0].map((_, s) => weights.reduce((sum, w) => sum + w[s], 0) / heads.length);
  }

  // The numbers inside the network at the position before `position`, which is computed again from
  // the keys and values in the cache: the embeddings and their parts, the output of attention, hidden
  // units and residual stream of each block, and the logit lens, (n_layer + 1) x (V).
  trace(cache, position) {
    const { gpt, ids } = this;
    const row = position - 1 - this.first_of(position);
    const before = [...FACTORS.slice(1).fill(0), ...ids.slice(this.first_of(position), position)];
    const newest_ids = before.slice(-FACTORS.length, -1);
    const past = Object.assign(Object.create(KVCache.prototype), cache, { length: row, newest_ids });
    const stages = [];
    gpt.forward([ids[position - 1]], past, (x) => stages.push(x.slice()));
    const [embeddings] = stages;
    const blocks = gpt.blocks.map((_, layer) => {
      const [attention, hidden, residual] = stages.slice(3 * layer + 1);
      return { attention, hidden, residual };
    });
    const lens = [embeddings, ...blocks.map(({ residual }) => residual)].map((x) => gpt.read(x, 1));
    return { embeddings, parts: this.embedding_parts(before, row), blocks, lens };
  }

  // Each vector that is added up to the embeddings of the last of these ids, with its table and row.
  embedding_parts(ids, row) {
    const { gpt } = this;
    const at = ids.length - 1;
    const parts = [["token", gpt.token_embedding, ids[at]]];
    if (gpt.position_embedding) parts.push(["position", gpt.position_embedding, row]);
    if (gpt.ngram_embedding) {
      const rows = gpt.ngram_embedding.rows_of(ids, at);
      Object.keys(gpt.config.ngrams).forEach((n, i) => parts.push([Number(n), gpt.ngram_embedding.table, rows[i]]));
    }
    return parts.map(([table, embedding, index]) => {
      const vector = new Float32Array(gpt.config.n_embd);
      embedding.add_to(vector, index);
      return { table, index, vector };
    });
  }

  // Attention weights among up to MAP characters, of all heads of a layer, (H, n, n). The last one is
  // the one before `position`, or `until` if both fit.
  maps(cache, position, layer, until) {
    const { n_embd: C, n_head } = this.gpt.config;
    const [first, row] = [this.first_of(position), position - 1 - this.first_of(position)];
    const fits = until >= position - 1 && until - first < cache.length && until - position + 1 < MAP;
    const last = fits ? until - first : row;
    const from = Math.max(0, last - MAP + 1);
    const n = last - from + 1;
    const weights = new Float32Array(n_head * n * n);
    for (let head = 0; head < n_head; head++) {
      for (let t = 0; t < n; t++) {
        const all = attention_weights(cache.layers[layer], head, from + t, C, C / n_head);
        weights.set(all.subarray(from), (head * n + t) * n);
      }
    }
    return { from: first + from, n, weights };
  }

  // The query of one head at the position before `position`, (D), and the keys it is compared with, (S, D).
  query_and_keys(cache, position, layer, head) {
    const { n_embd: C, n_head } = this.gpt.config;
    const [D, row] = [C / n_head, position - 1 - this.first_of(position)];
    const { queries, keys } = cache.layers[layer];
    const of_head = (x, s) => x.slice(s * C + head * D, s * C + (head + 1) * D);
    return { query: of_head(queries, row), keys: Array.from({ length: row + 1 }, (_, s) => of_head(keys, s)) };
  }
}

function cross_entropy(logits, id) {
  let [highest, total] = [-Infinity, 0];
  for (const logit of logits) highest = Math.max(highest, logit);
  for (const logit of logits) total += Math.exp(logit - highest);
  return Math.log(total) + highest - logits[id];
}

// ---- the worker, which runs all of this off the main thread ----

// Each incoming message is a job, and its replies carry the job's number. A job yields to incoming
// messages every few milliseconds; a new text ends the previous job.
class Server {
  constructor(post) {
    this.post = post;
    this.text_job = null;
  }

  async answer(message) {
    try {
      await this[message.type](message);
    } catch (error) {
      this.post({ type: "failed", job: message.job, message: error.message });
    }
  }

  load({ job, config, vocab_size, weights, base64, example }) {
    this.gpt = new GPT(config, vocab_size, read_weights(base64, weights));
    check_example(this.gpt, example);
    this.post({ type: "loaded", job });
  }

  stop() {
    this.text_job = null;
  }

  async write({ job, prompt, settings }) {
    this.text_job = job;
    const reading = (this.reading = new Reading(this.gpt, [...prompt], true));
    const report = this.reporter(job);
    let known = 1; // the first position without a loss; windows before the prompt's are not scored
    while (reading.first_of(known) < reading.first_of(prompt.length)) known += 1;
    for (const { ids, cache, first } of generate(this.gpt, prompt, settings)) {
      if (reading.passages.get(first) !== cache) reading.remember(first, cache);
      reading.ids.push(...ids);
      const end = Math.min(first + cache.length + 1, reading.ids.length);
      if (end > known) report(ids, known, reading.losses(cache, known, end));
      known = Math.max(known, end);
      if (await report.pause()) break;
    }
    report.end();
  }

  async score({ job, ids }) {
    this.text_job = job;
    const reading = (this.reading = new Reading(this.gpt, ids, false));
    const report = this.reporter(job);
    const { block_size } = this.gpt.config;
    for (let known = 1, stopped = false; known < ids.length && !stopped; ) {
      const end = Math.min(known + Math.min(CHUNK, block_size - ((known - 1) % block_size)), ids.length);
      const cache = await this.finish(reading.reach(end - 1));
      report([], known, reading.losses(cache, known, end));
      known = end;
      stopped = await report.pause();
    }
    report.end();
  }

  // What the page shows about a character; `until`: the last character of the maps, null for no maps.
  async look({ job, position, layer, head, until }) {
    const { reading } = this;
    const cache = await this.finish(reading.reach(position));
    const logits = reading.logits(cache, position).slice();
    const weights = reading.attention(cache, position, layer, head);
    const maps = until !== null && reading.maps(cache, position, layer, until);
    const pair = head !== null && reading.query_and_keys(cache, position, layer, head);
    const trace = { ...reading.trace(cache, position), maps, pair };
    this.post({ type: "seen", job, position, logits, weights, first: reading.first_of(position), trace });
  }

  async finish(generator) {
    for (;;) {
      const { value, done } = generator.next();
      if (done) return value;
      await yield_to_messages();
    }
  }

  // Collect new ids and losses and send them about 30 times a second.
  reporter(job) {
    let [ids, from, losses, sent, started] = [[], null, [], 0, performance.now()];
    const send = () => {
      if (losses.length) this.post({ type: "text", job, ids, from, losses });
      [ids, from, losses, sent] = [[], null, [], performance.now()];
    };
    const report = (more_ids, position, more_losses) => {
      if (from !== null && position !== from + losses.length) send();
      from ??= position;
      ids.push(...more_ids);
      losses.push(...more_losses);
    };
    report.pause = async () => {
      if (performance.now() - sent > 30) {
        send();
        await yield_to_messages();
      }
      return this.text_job !== job;
    };
    report.end = () => {
      send();
      const stopped = this.text_job !== job;
      this.post({ type: "ended", job, stopped, seconds: (performance.now() - started) / 1000 });
      if (!stopped) this.text_job = null;
    };
    return report;
  }
}

// Let the event loop handle messages. Unlike nested setTimeout calls, this has no 4 ms delay.
const yield_to_messages = () =>
  new Promise((resolve) => {
    const { port1, port2 } = new MessageChannel();
    port1.onmessage = () => {
      port1.close();
      resolve();
    };
    port2.postMessage(null);
  });

if (typeof WorkerGlobalScope !== "undefined") {
  const server = new Server((message) => postMessage(message));
  onmessage = ({ data }) => server.answer(data);
}
