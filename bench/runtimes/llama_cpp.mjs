// llama.cpp by node-llama-cpp, as a server of lines for bench/runtimes.py:
//   node llama_cpp.mjs FILE.gguf THREADS CONTEXT
//   {"ids": [...], "new": 8}       -> {"first_ms": 1.0, "token_ms": [...], "peak_bytes": 1}
//   {"ids": [...], "next": [...]}  -> {"losses": [...]}   -log p of each next token, which is then appended
import {readFileSync} from "node:fs";
import {createInterface} from "node:readline";
import {getLlama} from "node-llama-cpp";

const [file, threads, context] = process.argv.slice(2);
const llama = await getLlama({gpu: false, build: "never", maxThreads: Number(threads), logLevel: "error"});
const model = await llama.loadModel({modelPath: file});
const made = await model.createContext({
    contextSize: Number(context), batchSize: Number(context), threads: Number(threads), flashAttention: true
});
const sequence = made.getSequence();
const version = JSON.parse(readFileSync(new URL("node_modules/node-llama-cpp/package.json", import.meta.url))).version;
console.log(JSON.stringify({version: `node-llama-cpp ${version}`}));

async function timed(ids, count) {
    const times = [];
    let before = performance.now();
    for await (const _ of sequence.evaluate(ids, {temperature: 0})) {
        const now = performance.now();
        times.push(now - before);
        before = now;
        if (times.length >= count)
            break;
    }
    const peak = /VmHWM:\s+(\d+)/.exec(readFileSync("/proc/self/status", "utf8"));
    return {first_ms: times[0], token_ms: times.slice(1), peak_bytes: 1024 * Number(peak[1])};
}

async function lost(ids, next) {
    const losses = [];
    for (const [place, token] of next.entries()) {
        const given = place === 0 ? ids : [next[place - 1]];
        const asked = {probabilities: true, options: {temperature: 1, topK: 0, topP: 1, minP: 0}};
        const input = [...given.slice(0, -1), [given.at(-1), {generateNext: asked}]];
        const found = (await sequence.controlledEvaluate(input)).at(-1).next;
        losses.push(-Math.log(found.probabilities.get(token)));
    }
    return {losses};
}

for await (const line of createInterface({input: process.stdin})) {
    const {ids, new: count, next} = JSON.parse(line);
    await sequence.clearHistory();
    console.log(JSON.stringify(next ? await lost(ids, next) : await timed(ids, count)));
}
process.exit(0);
