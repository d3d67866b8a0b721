// Runs the scripts of an exported page in Node: node page.cjs PAGE.html < {"script", "input"}
// The script can use the page's functions, `gpt`, `input` and `base64`; its value is printed as JSON.
const fs = require("fs");
const vm = require("vm");

const html = fs.readFileSync(process.argv[2], "utf8");
const part = (id) => html.match(new RegExp(`<script[^>]* ?id="${id}">([^]*?)</script>`))[1];
const { script, input, simd } = JSON.parse(fs.readFileSync(0, "utf8"));

globalThis.DATA = JSON.parse(part("data"));
globalThis.base64 = part("weights");
globalThis.input = input;
vm.runInThisContext(part("kernel") + part("network"));
vm.runInThisContext(`
  const vocabulary = new Vocabulary(DATA.vocabulary, DATA.stand_ins);
  const gpt = new GPT(DATA.config, DATA.vocabulary.length, read_weights(base64, DATA.weights, ${simd}));
  // the network's logits at every position, (T, V)
  const logits_of = (ids) => {
    const cache = new KVCache(gpt);
    for (const _ of prefill(gpt, cache, ids));
    return Array.from(cache.logits.subarray(0, ids.length * gpt.vocab_size));
  };
`);
Promise.resolve(vm.runInThisContext(script)).then((value) => process.stdout.write(JSON.stringify(value)));
