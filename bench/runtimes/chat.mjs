// transformers.js on a folder by layout.py, the same in Node and in a page: its own tokenizer, template and
// generate, no options.

export async function chat(library, name, asked, onText = () => {}) {
  const tokenizer = await library.AutoTokenizer.from_pretrained(name)
  const model = await library.AutoModelForCausalLM.from_pretrained(name)
  const messages = [{ role: "user", content: asked.prompt }]
  const text = asked.chat
    ? tokenizer.apply_chat_template(messages, { tokenize: false, add_generation_prompt: true })
    : asked.prompt
  const inputs = tokenizer(text, { add_special_tokens: !asked.chat })
  const streamer = new library.TextStreamer(tokenizer, {
    skip_prompt: true, skip_special_tokens: true, callback_function: onText,
  })
  const out = await model.generate({ ...inputs, max_new_tokens: asked.new_tokens, do_sample: false, streamer })
  const ids = inputs.input_ids.tolist()[0].map(Number)
  return { version: library.env.version, prompt_ids: ids, tokens: out.tolist()[0].slice(ids.length).map(Number) }
}
