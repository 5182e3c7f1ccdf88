"""Several API server processes in front of one engine (`--api-server-count`).

vLLM starts them, and each answers its share of the connections: it reads requests, makes tokens of text and text of
tokens. Adapters are kept in one place, by the first of them, the keeper: their registry, their turns in the slots,
their host memory, the metrics of the engine. The others, the fronts, ask it: over a link before and after each request
that uses an adapter (`link`, `keeper`, `front`), and by handing on whole HTTP requests about adapters (`forward`).
Both go over Unix sockets in a folder that only this user can open. When one process ends, vLLM ends them all.
"""
