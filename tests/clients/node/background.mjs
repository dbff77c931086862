// What the npm `openai` package sees of background responses, as JSON. Arguments: URL, key.
import OpenAI from 'openai';

const [url, key] = process.argv.slice(2);
const model = 'anthropic/claude-haiku-4.5';
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: key, maxRetries: 0, timeout: 60_000 });
const { responses } = client;

async function ended(response) {
  while (['queued', 'in_progress'].includes(response.status)) {
    await new Promise((resolve) => setTimeout(resolve, 50));
    response = await responses.retrieve(response.id);
  }
  return response;
}

async function polled() {
  const taken = await responses.create({ model, input: 'Hello', background: true });
  const done = await ended(taken);
  return { taken: taken.status, status: done.status, text: done.output_text.includes('Hello') };
}

async function resumed() {
  const events = [];
  const stream = await responses.create({ model: 'xenios/sim-n60-d20', input: 'Hello', background: true, stream: true });
  for await (const event of stream) {
    events.push(event);
    if (events.length > 12) break;
  }
  const { id } = events[0].response;
  const starting_after = events.at(-1).sequence_number;
  for await (const event of await responses.retrieve(id, { stream: true, starting_after })) events.push(event);
  const text = events.map((event) => (event.type === 'response.output_text.delta' ? event.delta : '')).join('');
  return {
    numbers: events.map((event) => event.sequence_number),
    last: events.at(-1).type,
    whole: text === (await responses.retrieve(id)).output_text,
  };
}

async function cancelled() {
  const { id } = await responses.create({ model: 'xenios/sim-hang', input: 'Hello', background: true });
  return [(await responses.cancel(id)).status, (await responses.cancel(id)).status];
}

const kept = await ended(await responses.create({ model, input: 'Hello', background: true }));
const items = (await responses.inputItems.list(kept.id)).data.map((item) => item.role);
await responses.delete(kept.id);
const deleted = await responses.retrieve(kept.id).then(
  () => null,
  (error) => ({ name: error.constructor.name, status: error.status }),
);

console.log(
  JSON.stringify({ polled: await polled(), resumed: await resumed(), cancelled: await cancelled(), items, deleted }),
);
