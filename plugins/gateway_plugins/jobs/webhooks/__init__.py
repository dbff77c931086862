"""Webhooks: signed messages to others when something has ended, as Standard Webhooks and OpenAI's SDKs know them."""
