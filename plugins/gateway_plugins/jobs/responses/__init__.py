"""Background responses: `background: true` at /v1/responses as OpenAI's SDKs use it; upstreams know nothing of it."""
