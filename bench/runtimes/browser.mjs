// A page in headless Chromium on a model folder served from this machine, and nothing from elsewhere.
//
// node browser.mjs PAGE.html DIR '{"prompt": "...", ..., "screenshot": "FILE.png", "chromium": "/usr/bin/chromium"}'
//   ->  one line of JSON: what the page put into window.outcome
import { createReadStream, statSync } from "node:fs"
import { createServer } from "node:http"
import { createRequire } from "node:module"
import { dirname, extname, join, normalize, resolve } from "node:path"
import { fileURLToPath } from "node:url"
import { chromium } from "playwright-core"

const here = dirname(fileURLToPath(import.meta.url))
const [page, directory, asked] = [process.argv[2], resolve(process.argv[3]), JSON.parse(process.argv[4])]
const resolveIn = (folder) => dirname(createRequire(folder).resolve("onnxruntime-web"))
const transformers = join(here, "node_modules/@huggingface/transformers/dist/")
const roots = {
  "/model/": directory,
  "/transformers/": transformers,
  "/ort/": resolveIn(join(here, "browser.mjs")),
  "/transformers-ort/": resolveIn(join(transformers, "transformers.js")), // the build that it was made with
  "/": here,
}
const types = { ".html": "text/html", ".mjs": "text/javascript", ".js": "text/javascript", ".wasm": "application/wasm",
  ".json": "application/json" }

const server = createServer((request, response) => {
  const path = normalize(decodeURIComponent(new URL(request.url, "http://here").pathname))
  const root = Object.keys(roots).find((prefix) => path.startsWith(prefix))
  const file = join(roots[root], path.slice(root.length))
  const found = statSync(file, { throwIfNoEntry: false })
  if (!found?.isFile()) return response.writeHead(404).end()
  response.writeHead(200, { "content-type": types[extname(file)] ?? "application/octet-stream",
    "content-length": found.size })
  return request.method === "HEAD" ? response.end() : createReadStream(file).pipe(response)
})
await new Promise((listening) => server.listen(0, "127.0.0.1", listening))

const browser = await chromium.launch({ executablePath: asked.chromium, args: ["--no-sandbox", "--disable-gpu"] })
try {
  const tab = await browser.newPage({ viewport: { width: 900, height: 300 } })
  const said = []
  tab.on("console", (message) => said.push(message.text()))
  tab.on("pageerror", (error) => said.push(String(error)))
  await tab.goto(`http://127.0.0.1:${server.address().port}/${page}#${encodeURIComponent(JSON.stringify(asked))}`)
  await tab.waitForFunction(() => window.outcome, null, { timeout: 0, polling: 250 })
  const answer = await tab.evaluate(() => window.outcome)
  if (asked.screenshot) await tab.screenshot({ path: asked.screenshot })
  if (answer.error) throw new Error([answer.error, ...said].join("\n"))
  console.log(JSON.stringify({ ...answer, version: `${answer.version}, Chromium ${browser.version()}` }))
} finally {
  await browser.close()
  server.close()
}
