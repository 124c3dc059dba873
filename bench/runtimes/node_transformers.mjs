// transformers.js in Node: node node_transformers.mjs DIR '{"prompt": "...", "chat": true, ...}'  ->  one line of JSON
import { basename, dirname, resolve } from "node:path"
import * as library from "@huggingface/transformers"
import { chat } from "./chat.mjs"

const [directory, asked] = [resolve(process.argv[2]), JSON.parse(process.argv[3])]
library.env.allowRemoteModels = false
library.env.localModelPath = dirname(directory) + "/"
const answer = await chat(library, basename(directory), asked)
console.log(JSON.stringify({ ...answer, version: `${answer.version}, Node ${process.version}` }))
