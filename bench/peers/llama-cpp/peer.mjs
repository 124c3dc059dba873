// llama.cpp through node-llama-cpp, from a GGUF file: the child of bench/peers/run.py, see protocol.py.
//
// argv[2] is the configuration; "packages" in it is the directory whose node_modules holds the package. Decode is
// greedy: the n tokens after the first are each one step of the same length, whatever they are.

import fs from "node:fs";
import path from "node:path";
import readline from "node:readline";
import {pathToFileURL} from "node:url";

const config = JSON.parse(process.argv[2]);
const answer = (value) => fs.writeSync(1, JSON.stringify(value) + "\n");
const short = (error) => ({error: `${error.name}: ${String(error.message).slice(0, 400)}`});

const greedy = {temperature: 0, yieldEogToken: true};

async function load() {
    const start = performance.now();
    const root = path.join(config.packages, "node_modules", "node-llama-cpp");
    const {getLlama} = await import(pathToFileURL(path.join(root, "dist", "index.js")));
    const llama = await getLlama({gpu: false, build: "never", maxThreads: config.threads, logLevel: "error"});
    const model = await llama.loadModel({modelPath: config.model, gpuLayers: 0});
    const context = await model.createContext({
        contextSize: config.capacity + 8, batchSize: config.capacity, sequences: 1,
        threads: {ideal: config.threads, min: config.threads}
    });
    const facts = {
        weight_bits: config.weight_bits,
        bits_per_weight: config.bits_per_weight,
        logits: "last",
        decode: "greedy",
        flash_attention: context.flashAttention,
        versions: {
            "node-llama-cpp": JSON.parse(fs.readFileSync(path.join(root, "package.json"))).version,
            "llama.cpp": llama.llamaCppRelease.release,
            node: process.version
        },
        load_seconds: Math.round(performance.now() - start) / 1000
    };
    return {sequence: context.getSequence(), facts};
}

// The iterator gives a token after the prompt, and one more after each further step.
async function run(sequence, ids, steps) {
    const tokens = sequence.evaluate(ids, greedy);
    const found = [(await tokens.next()).value];
    const start = process.hrtime.bigint();
    while (found.length <= steps)
        found.push((await tokens.next()).value);
    const ns = Number(process.hrtime.bigint() - start);
    await tokens.return();
    if (found.includes(undefined))
        throw new Error("the sequence ended before its tokens were decoded");
    return {found, ns};
}

async function respond(sequence, {kind, tokens, ids}) {
    await sequence.clearHistory();
    if (kind === "say")
        return {ids: (await run(sequence, ids, tokens - 1)).found};
    if (kind === "tg")
        return {ns: (await run(sequence, ids.slice(0, ids.length - tokens), tokens)).ns};
    const depth = ids.length - tokens;
    if (depth > 0)
        await sequence.evaluateWithoutGeneratingNewTokens(ids.slice(0, depth));
    const start = process.hrtime.bigint();
    await run(sequence, ids.slice(depth), 0);
    return {ns: Number(process.hrtime.bigint() - start)};
}

let loaded;
try {
    loaded = await load();
    answer({ready: loaded.facts});
} catch (error) {
    answer(short(error));
    process.exit(0);
}
for await (const line of readline.createInterface({input: process.stdin})) {
    try {
        answer(await respond(loaded.sequence, JSON.parse(line)));
    } catch (error) {
        answer(short(error));
    }
}
process.exit(0);
