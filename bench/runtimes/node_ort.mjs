// onnxruntime-node: node node_ort.mjs DIR '{"ids": [...], "new_tokens": 16}'  ->  one line of JSON
import { readFileSync } from "node:fs"
import { join } from "node:path"
import ort from "onnxruntime-node"
import { greedy } from "./loop.mjs"

const [directory, asked] = [process.argv[2], JSON.parse(process.argv[3])]
const genai = JSON.parse(readFileSync(join(directory, "genai_config.json"), "utf-8"))
const session = await ort.InferenceSession.create(join(directory, "model.onnx"), { executionProviders: ["cpu"] })
const tokens = await greedy(ort, session, genai.model.decoder.head_size, asked.ids, asked.new_tokens)
console.log(JSON.stringify({ version: `${ort.env.versions.node}, Node ${process.version}`, tokens }))
