"""A simulated OpenRouter on a real socket: all proxied endpoints, deterministic answers, faults on demand.

Nothing leaves the machine and nothing is spent. Every model of the bundled list answers; ids, token counts
(about four characters a token) and costs look as OpenRouter's do. A model whose name after the last `/`
begins with `sim` is steered by the words of its name, separated by `-`, in any order:
`xenios/sim-t200-n50-d10-cutmid`. Words that are not in this table are just names.

| word | effect |
|---|---|
| `tN` | N ms before the first byte |
| `nN` | N content chunks (the text is then exactly N chunks long) |
| `dN` | N ms between chunks |
| `bN` | N bytes of text per chunk |
| `fail-N` | HTTP status N in OpenRouter's error shape; 429 with its headers, 403 as a moderation refusal |
| `retry-V` | with `fail`: the `Retry-After` sent: seconds, `date`, `huge`, `negative` or `none` |
| `ctx` | 400 `context_length_exceeded` |
| `flaky-N` | N % of the requests fail with 503, evenly spread, by a counter per name |
| `reset` / `close` | TCP reset / end of file before any header |
| `hang` | accepts and never answers |
| `redirect` | 307 to another path of the same host |
| `badjson` / `html` | 200 with half a JSON / with an HTML page |
| `err200` | 200 whose body is `{"error": …}` |
| `gzipbomb` | 200 with 100 MB of spaces in 100 kB of gzip |
| `finerr` | 200, half of the text, finish reason `error` |
| `slowpre-N` | stream: comments for N ms between preamble and first content |
| `cutmid` / `rstmid` | half of the content, then the connection is closed / reset without an end |
| `stallmid` | half of the content, then silence |
| `errmid` | half of the content, then the error event, no end marker (whole: half of the text and an error) |
| `errpre` | comments and preamble, then the error event, no content |
| `nodone` | stream: no end marker (`[DONE]`, `response.completed`, `message_stop`) |
| `nofinish` | no finish reason, but the end marker |
| `nousage` / `negusage` / `absusage` | usage missing / negative / absurdly large |
| `empty` | no content, 0 completion tokens |
| `split` | stream: each event in two writes, inside a UTF-8 sequence where there is one |
| `cr` | stream: lines end in CR alone |
| `bigline` | all text in one line of 10 MB |
| `afterdone` | stream: chunks after the end marker |

`xenios/sim-expiring` stands in the list of models with an `expiration_date` thirty days ahead.

Requests steer too. `tools` together with `tool_choice`, or with a last message that says "tool" or "weather",
are answered by a tool call whose arguments satisfy the tool's schema; a schema for structured output by an
instance of it; a token limit cuts the answer with finish reason `length`; `reasoning` adds reasoning.
`models[]` and `fallbacks[]` are tried in order when a model fails before its first byte.
"""

from gateway.simulator.server import Generation, SeenRequest, Simulator

__all__ = ["Generation", "SeenRequest", "Simulator"]
