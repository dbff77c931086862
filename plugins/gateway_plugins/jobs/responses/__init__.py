"""Background responses: `background: true` at /v1/responses."""
