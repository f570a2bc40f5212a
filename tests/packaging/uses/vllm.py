"""The client for vLLM against a server with its fields: token ids and log-probabilities are kept."""

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

from metis_agent.models.vllm import VLLMChatModel
from metis_agent.types import TOKEN_RECORD


class Handler(BaseHTTPRequestHandler):
    """One answer, as vLLM gives it."""

    def log_message(self, *_):
        pass

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        tokens = [{"token": text, "logprob": -0.25, "bytes": None, "top_logprobs": []} for text in ("4", "2")]
        choice = {
            "index": 0, "message": {"role": "assistant", "content": "42"}, "finish_reason": "stop",
            "logprobs": {"content": tokens}, "token_ids": [7, 8],
        }  # fmt: skip
        body = json.dumps(
            {
                "id": "1",
                "object": "chat.completion",
                "created": 1,
                "model": "m",
                "choices": [choice],
                "usage": {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5},
                "prompt_token_ids": [1, 2, 3],
            }
        ).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


server = HTTPServer(("127.0.0.1", 0), Handler)
threading.Thread(target=server.serve_forever, daemon=True).start()
model = VLLMChatModel(base_url=f"http://127.0.0.1:{server.server_port}/v1", model="m", max_retries=0)
reply = model.invoke("6 * 7?")
record = reply.response_metadata[TOKEN_RECORD]
assert reply.text == "42"
assert list(record["completion_ids"]) == [7, 8]
assert list(record["log_probs"]) == [-0.25, -0.25]
server.shutdown()
