"""torch.compile

Prune where you compile. The first call calibrates, decides, recovers and slices; later calls run what is left, and
another batch size gets the same plan without scoring again.

>>> import torch
>>> from fxprune import dynamo
>>> layers = torch.nn.Linear(32, 256), torch.nn.GELU(), torch.nn.Linear(256, 32)
>>> model = torch.nn.Sequential(*layers).eval()
>>> loader = [torch.randn(64, 32) for _ in range(4)]
>>> fast = torch.compile(model, backend="fxprune", options={"flops": 0.5, "data": loader, "inner": "eager"})
>>> with torch.no_grad():
...     fast(torch.randn(16, 32)).shape, fast(torch.randn(5, 32)).shape
(torch.Size([16, 32]), torch.Size([5, 32]))
>>> round(dynamo.report_of(fast)[0]["cost"]["ratio"]["flops"], 2)  # one entry per graph that dynamo made
0.5
>>> len(dynamo.plan_of(fast).choices["0:ffn"].keep)            # the names that fxprune.plan gives
128

`inner` compiles what is left: inductor (default), aot_eager or eager. The model is left as it was; training mode,
inputs that require gradients and models that write to their buffers are errors, or run dense with "fallback": True.
Where a model breaks into several graphs, each is pruned to the budget on its own, or left whole and reported.

Options:

{options}
"""
