// What the npm `openai` package sees of a gateway, as JSON. Arguments: URL, key.
import OpenAI, { toFile } from 'openai';

const [url, key] = process.argv.slice(2);
const model = 'anthropic/claude-haiku-4.5';
const messages = [{ role: 'user', content: 'Hello' }];
const askForWeather = [{ role: 'user', content: 'What is the weather in Oslo?' }];
const weather = {
  type: 'function',
  function: {
    name: 'get_weather',
    parameters: {
      type: 'object',
      properties: { city: { type: 'string' }, days: { type: 'integer' } },
      required: ['city', 'days'],
    },
  },
};
// maxRetries: errors are looked at, not waited out
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: key, maxRetries: 0, timeout: 20_000 });
const chat = client.chat.completions;

async function streamed(fields) {
  const chunks = [];
  for await (const chunk of await chat.create({ model, messages, stream: true, ...fields })) chunks.push(chunk);
  return chunks;
}

async function raised(call) {
  try {
    await call();
  } catch (error) {
    return { name: error.constructor.name, status: error.status ?? null, code: error.code ?? null };
  }
  return null;
}

const textOf = (chunks) => chunks.map((chunk) => chunk.choices[0]?.delta.content ?? '').join('');

const scenarios = {
  async whole() {
    const { data, response } = await chat.create({ model, messages }).withResponse();
    return {
      text: data.choices[0].message.content,
      tokens: data.usage.total_tokens,
      requestId: data._request_id,
      header: response.headers.get('x-request-id'),
      served: response.headers.get('x-xenios-model'),
    };
  },
  async stream() {
    const chunks = await streamed({});
    return { text: textOf(chunks), everyChunkHasAChoice: chunks.every((chunk) => chunk.choices.length === 1) };
  },
  async usage() {
    const chunks = await streamed({ stream_options: { include_usage: true } });
    const last = chunks.at(-1);
    return { choices: last.choices.length, tokens: last.usage.total_tokens };
  },
  async tool() {
    const { choices } = await chat.create({ model, messages: askForWeather, tools: [weather] });
    return Object.keys(JSON.parse(choices[0].message.tool_calls[0].function.arguments));
  },
  async streamedTool() {
    const final = await chat.stream({ model, messages: askForWeather, tools: [weather] }).finalChatCompletion();
    return Object.keys(JSON.parse(final.choices[0].message.tool_calls[0].function.arguments));
  },
  async embeddings() {
    const fields = { model: 'openai/text-embedding-3-small', input: ['one', 'two'], dimensions: 8 };
    const byDefault = await client.embeddings.create(fields);
    const asFloats = await client.embeddings.create({ ...fields, encoding_format: 'float' });
    const far = (a, b) => a.some((value, n) => Math.abs(value - b[n]) > 1e-6);
    return {
      lengths: byDefault.data.map((item) => item.embedding.length),
      same: byDefault.data.every((item, n) => !far(item.embedding, asFloats.data[n].embedding)),
    };
  },
  async models() {
    const ids = [];
    for await (const item of client.models.list()) ids.push(item.id);
    const one = await client.models.retrieve(model);
    return { ids, one: one.id, object: one.object };
  },
  async responses() {
    const whole = await client.responses.create({ model, input: 'Hello' });
    const kinds = [];
    let text = '';
    for await (const event of await client.responses.create({ model, input: 'Hello', stream: true })) {
      kinds.push(event.type);
      if (event.type === 'response.output_text.delta') text += event.delta;
    }
    return { whole: whole.output_text, streamed: text, first: kinds[0], last: kinds.at(-1) };
  },
  async image() {
    const { data } = await client.images.generate({ model: 'openai/gpt-image-1', prompt: 'A red square' });
    return Buffer.from(data[0].b64_json, 'base64').subarray(1, 4).toString();
  },
  async audio() {
    const speech = await client.audio.speech.create({
      model: 'openai/gpt-4o-mini-tts', voice: 'alloy', input: 'Hello', response_format: 'wav',
    });
    const bytes = Buffer.from(await speech.arrayBuffer());
    const file = await toFile(bytes, 'hello.wav', { type: 'audio/wav' });
    const { text } = await client.audio.transcriptions.create({ model: 'openai/whisper-1', file });
    return { head: bytes.subarray(0, 4).toString(), text };
  },
  async errors() {
    const stranger = client.withOptions({ apiKey: 'sk-somebody-else' });
    return {
      wrongKey: await raised(() => stranger.chat.completions.create({ model, messages })),
      unknownModel: await raised(() => chat.create({ model: 'nobody/nothing', messages })),
      rateLimit: await raised(() => chat.create({ model: 'xenios/sim-fail-429-n5', messages })),
      upstreamDown: await raised(() => chat.create({ model: 'xenios/sim-reset', messages })),
      brokenAnswer: await raised(() => chat.create({ model: 'xenios/sim-err200', messages })),
      midStream: await raised(() => streamed({ model: 'xenios/sim-n10-d1-errmid' })),
      cutStream: await raised(() => streamed({ model: 'xenios/sim-n10-d1-cutmid' })),
    };
  },
  async leaving() {
    for await (const chunk of await chat.create({ model: 'xenios/sim-n500-d20', messages, stream: true })) {
      if (chunk.choices.length) break;
    }
    return (await chat.create({ model, messages })).choices[0].finish_reason;
  },
};

const seen = {};
for (const [name, scenario] of Object.entries(scenarios)) seen[name] = await scenario();
console.log(JSON.stringify(seen));
