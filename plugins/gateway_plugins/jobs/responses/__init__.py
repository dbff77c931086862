"""Background responses: `background: true` at /v1/responses, as OpenAI's SDKs use it, at upstreams that keep nothing."""
