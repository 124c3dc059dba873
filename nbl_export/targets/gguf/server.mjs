// llama.cpp through node-llama-cpp: one GGUF file, one sequence; a request a line in, an answer a line out.
//
// argv[2] is {packages, model, threads}; packages is a directory whose node_modules holds node-llama-cpp.
// {ask: "begin", tokens}           -> {}                 room for so many tokens, nothing in the cache
// {ask: "append", ids}             -> {best}             run the ids as one chunk; the likeliest next token
// {ask: "rewind", length}          -> {}                 drop what comes after
// {ask: "score", ids}              -> {logs, best}       natural logarithms of the probability of ids[1..]; likeliest tokens
// {ask: "logits", ids}             -> {logits}           of the last token, the whole vocabulary
// {ask: "encode", text}            -> {ids}              control tokens in the text count as such
// {ask: "decode", ids}             -> {text}
// A failed request gives {error}. Flash attention is off: llama.cpp has none for files with linear layers.

import fs from "node:fs";
import path from "node:path";
import readline from "node:readline";
import {pathToFileURL} from "node:url";

const config = JSON.parse(process.argv[2]);
function answer(value) {  // a pipe takes a part of a long line at a time
    let rest = Buffer.from(JSON.stringify(value) + "\n");
    while (rest.length > 0) {
        try {
            rest = rest.subarray(fs.writeSync(1, rest));
        } catch (error) {
            if (error.code !== "EAGAIN")
                throw error;
        }
    }
}

const short = (error) => ({error: `${error.name}: ${String(error.message).slice(0, 400)}`});

const root = path.join(config.packages, "node_modules", "node-llama-cpp");
const {getLlama} = await import(pathToFileURL(path.join(root, "dist", "index.js")));
let model, context, sequence;

async function load() {
    const llama = await getLlama({gpu: false, build: "never", maxThreads: config.threads, logLevel: "error"});
    const versions = {
        "node-llama-cpp": JSON.parse(fs.readFileSync(path.join(root, "package.json"))).version,
        "llama.cpp": llama.llamaCppRelease.release
    };
    if (config.model)
        model = await llama.loadModel({modelPath: config.model, gpuLayers: 0});
    return {versions};
}

async function begin({tokens}) {
    if (context && context.contextSize >= tokens) {
        await sequence.clearHistory();
        return {};
    }
    await context?.dispose();
    context = await model.createContext({
        contextSize: tokens, batchSize: tokens, sequences: 1, flashAttention: false,
        threads: {ideal: config.threads, min: config.threads}
    });
    sequence = context.getSequence();
    return {};
}

async function last(ids, wanted) {
    const found = await sequence.controlledEvaluate([...ids.slice(0, -1), [ids.at(-1), {generateNext: wanted}]]);
    return found.at(-1).next;
}

const greedy = {temperature: 0};
const asks = {
    begin,
    append: async ({ids}) => ({best: (await last(ids, {token: true, options: greedy})).token}),
    rewind: async ({length}) => {
        if (length < sequence.nextTokenIndex)
            await sequence.eraseContextTokenRanges([{start: length, end: sequence.nextTokenIndex}]);
        return {};
    },
    logits: async ({ids}) => {
        const {logits} = await last(ids, {logits: true});
        const found = new Array(logits.size);
        for (const [token, value] of logits)
            found[token] = value;
        return {logits: found};
    },
    score: async ({ids}) => {  // from the probability of the likeliest token, and how far below its logit a token is
        const wanted = (target) => ({
            token: true, confidence: true, options: greedy,
            logits: {filter: {tokens: [target], includeSelected: true}}
        });
        const found = await sequence.controlledEvaluate(
            ids.slice(0, -1).map((id, i) => [id, {generateNext: wanted(ids[i + 1])}])
        );
        const below = ({logits, token}, i) => logits.get(ids[i + 1]) - logits.get(token);
        return {
            logs: found.map(({next}, i) => Math.log(next.confidence) + below(next, i)),
            best: found.map(({next}) => next.token)
        };
    },
    encode: async ({text}) => ({ids: model.tokenize(text, true)}),
    decode: async ({ids}) => ({text: model.detokenize(ids)})
};

try {
    answer({ready: await load()});
} catch (error) {
    answer(short(error));
    process.exit(0);
}
for await (const line of readline.createInterface({input: process.stdin})) {
    try {
        const request = JSON.parse(line);
        answer(await asks[request.ask](request));
    } catch (error) {
        answer(short(error));
    }
}
process.exit(0);
