"""Options

Kinds (--prune): heads (and KV groups), ffn, channels; tokens and blocks (tiles of weights) on request; also qk, v,
query, width, expert where a model has them. `fxprune inspect MODEL` lists the groups with their kinds. attention, mlp
and layers are parts of a residual stream that are there or not: fxprune help methods.

Leave alone (--freeze 'blocks.0.*'): a glob of parameters or groups; may be repeated. One that matches nothing is an
error.

For some layers alone: --floor and --align take a number, or PATTERN=NUMBER, and may be repeated; the last match
counts. A pattern is a glob of a group (`fxprune inspect` lists them) or of a module above it, or a kind.

  fxprune compile model.pt --flops 0.5 --floor 0.1 --floor 'blocks.*.mlp=0.3' --floor heads=0.5
  fxprune compile model.pt --flops 0.5 --align 8 --align '*.ffn=32' --out small

Options of options stand in braces: --importance 'trajectory{mode=exact,probes=32}', --tokens
'tome{schedule=constant}', --blocks '32x32{slice=0.7}', --recover 'ridge{rel=1}'. Misspelt ones are answered with the
nearest.

Where it works (--device): auto takes the GPU where there is one, cpu and cuda:1 say it. The model is captured where it
lies, scored and repaired on the device, and the result goes back: files do not depend on it. Data waits in pinned
memory and is sent batch by batch while the GPU computes; where its memory runs out, batches are halved and the work
goes on. A model that it cannot hold at all is an error, and with auto stays on the CPU. Latency is measured where the
model lies, or where the target runs: give a module on the GPU to budget the GPU's time.

From a file: fxprune.toml in the working directory, or --config FILE. The names are those of the command line; a table
with a command's name is for that command alone; the command line counts for more.

  flops = 0.5
  prune = ["heads", "ffn"]
  freeze = ["blocks.0.*"]
  floor = {"blocks.*.mlp" = 0.3}

  [compile]
  target = "onnx"
  importance = "trajectory{mode=exact}"

A fxprune.toml that just lies there cannot allow a pickle to run code or name Python code as data: say that on the
command line, or name the file with --config.

Everything that was asked for is in report.json under "options". The same run again:

  fxprune compile model.pt --config small/report.json --out again

In Python the names are the same, with underscores:

>>> import torch, fxprune
>>> model = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.ReLU(), torch.nn.Linear(64, 16))
>>> made = fxprune.compile(model, torch.randn(2, 16), flops=0.5, floor="ffn=0.25", align=["*.ffn=16"])
>>> made.report["options"]["floor"], len(made.plan.choices["0:ffn"].keep)
('ffn=0.25', 32)

Messages name options as they were given: --floor 0.3 on the command line, floor=0.3 in Python.

Every option, and what takes it (fxprune COMMAND --help says what it does there):

{options}
"""
