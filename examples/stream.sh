#!/usr/bin/env bash
# Stream from a running Penstock with curl: examples/stream.sh [URL]
set -euo pipefail
url="${1:-http://127.0.0.1:8000}"

echo "== the plain API"
curl -fsS "$url/generate?prompt=Once%20upon%20a%20time&max_tokens=12"
echo
echo "== the plain API, streamed"
curl -fsSN "$url/stream?prompt=Once%20upon%20a%20time&max_tokens=12"
echo "== OpenAI's API, streamed"
curl -fsSN "$url/v1/chat/completions" -H 'Content-Type: application/json' -d '{
  "messages": [{"role": "user", "content": "What is the capital of France?"}],
  "temperature": 0, "max_tokens": 16, "stream": true, "stream_options": {"include_usage": true}}'
