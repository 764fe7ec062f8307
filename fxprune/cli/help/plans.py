"""Plans

plan.json is the decision: for everything that is cut, by name, what was chosen: which elements of a group stay, how
many tokens go at an attention, which tiles of a weight stay. It is made to be read, diffed and edited, and fits every
checkpoint of the same architecture.

  fxprune plan model.pt --flops 0.5 --data data.npz --out plan.json
  fxprune apply model.pt --plan plan.json --out small

One choice per line, under "choices"; "kind" says how to read it:

  "blocks.0.mlp.fc1:ffn": {"kind": "ffn", "size": 96, "keep": [0, 3, 4, 9]}
  "blocks.3.attn.proj:token": {"kind": "token", "reducer": "tome", "removed": 8}
  "blocks.0.mlp.fc1.weight:block": {"kind": "block", "pattern": "32x32", "shape": [96, 24], "keep": [0, 2]}

Edit "keep": sorted, unique, below "size". What is not named stays whole. What is wrong is said with the
line: a group that the model does not have (with the nearest name), a kind or size that is another, an index out of
range or twice, a key twice, a group that is frozen, a whole branch gone. Counts need not be multiples of 8 (a note
says which are not); --align 8 insists.

>>> from fxprune import CompressionPlan
>>> text = '''{"fxprune_plan": 2, "choices": {
...   "0:ffn": {"kind": "ffn", "size": 4, "keep": [0, 7]}
... }}'''
>>> CompressionPlan.from_json(text, "plan.json")
Traceback (most recent call last):
fxprune.errors.PlanError: a kept index is out of range
  at    plan.json:2: group '0:ffn'
  why   indices must be 0..3, found 0..7

"about" says where a plan comes from; nothing is read from it. Plans of format 1 ("groups", "tokens" and "blocks" in
sections of their own, as 0.1.0 wrote them) are read, and pipelines that name them by their digest go on to replay.

The report of an applied plan has a pipeline that replays it like any other, with the plan given beside its text:
--plan small/plan.json (fxprune help pipelines).
"""
