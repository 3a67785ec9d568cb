"""A completions endpoint, for trying a model from tools that speak OpenAI's protocol: one process and device, loopback.

    batcher = Batcher(*open_text_run("runs/a"))
    batcher.start()
    uvicorn.run(application(batcher, "a"), host="127.0.0.1")

`python main.py serve RUN` does this. starlette and uvicorn are optional (`pip install recollect[serve]`).
"""

from recollect.configuration.base import lazy_names

__getattr__, __all__ = lazy_names(
    __name__,
    {
        "batching": "Batcher Busy Request",
        "completions": "Completions Refused read_completions",
        "endpoint": "Endpoint application",
    },
)
