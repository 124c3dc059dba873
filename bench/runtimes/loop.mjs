// The token loop over an onnxruntime session, the same for onnxruntime-node and onnxruntime-web.
// Caches are the graph's own inputs, so gaps in their ids do not matter.

export async function greedy(ort, session, headSize, ids, newTokens, onToken = () => {}) {
  const kinds = { float32: Float32Array, float16: globalThis.Float16Array ?? Uint16Array }
  const int64 = (values) => new ort.Tensor("int64", BigInt64Array.from(values.map(BigInt)), [1, values.length])
  const pasts = session.inputMetadata.filter((input) => input.name.startsWith("past_key_values."))
  const shape = (input) => [1, input.shape[1], 0, headSize]
  let caches = pasts.map((input) => new ort.Tensor(input.type, new kinds[input.type](0), shape(input)))
  let chunk = ids, length = 0
  const made = []
  for (let step = 0; step < newTokens; step++) {
    length += chunk.length
    const feeds = { input_ids: int64(chunk), attention_mask: int64(Array(length).fill(1)) }
    if (session.inputNames.includes("position_ids"))
      feeds.position_ids = int64(chunk.map((_, i) => length - chunk.length + i))
    pasts.forEach((input, i) => (feeds[input.name] = caches[i]))
    const results = await session.run(feeds)
    const [, rows, vocabulary] = results.logits.dims
    const last = results.logits.data.subarray((rows - 1) * vocabulary, rows * vocabulary)
    chunk = [last.reduce((best, value, i) => (value > last[best] ? i : best), 0)]
    caches = pasts.map((input) => results[input.name.replace("past_key_values", "present")])
    made.push(chunk[0])
    await onToken(chunk[0])
  }
  return made
}
