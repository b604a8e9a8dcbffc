"""A server on this machine that draws each request with its own LoRAs, which are switched in the 8-bit weights.

    python examples/lora_server.py MODEL loras/        # a folder of .safetensors files
    curl -o picture.png 'http://127.0.0.1:8000/?prompt=a+lighthouse&ink=0.8&pixel=0.4'
"""

import io
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from urllib.parse import parse_qsl, urlsplit

import torch
from diffusers import DiffusionPipeline

import sdtrt_backend


def server(model: str, folder: str, port: int = 8000, **how: object) -> HTTPServer:
    device, dtype = ("cuda", torch.float16) if torch.cuda.is_available() else ("cpu", torch.float32)
    pipe, paths = DiffusionPipeline.from_pretrained(model, dtype=dtype).to(device), list(Path(folder).glob("*.safetensors"))
    sdtrt_backend.accelerate(pipe, weights="keep")  # 16-bit weights on the GPU, so that a switch takes milliseconds
    for path in paths:
        sdtrt_backend.load_lora(pipe, path, path.stem)

    class Draw(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked, picture = dict(parse_qsl(urlsplit(self.path).query)), io.BytesIO()
            with sdtrt_backend.loras(pipe, {p.stem: float(asked[p.stem]) for p in paths if p.stem in asked}):
                pipe(asked.get("prompt", ""), **how).images[0].save(picture, "PNG")
            self.send_response(200)
            self.end_headers()
            self.wfile.write(picture.getvalue())

    return HTTPServer(("127.0.0.1", port), Draw)


if __name__ == "__main__":
    server(*sys.argv[1:3]).serve_forever()
