"""Methods

Nobody has to choose: with data the defaults are what measured best (fxprune help results), without data they are
``l2`` and no recovery.

What is tried by itself (compile and sweep, with data, where --prune and --importance are not said)

  First the plain plan: heads, neurons and channels by trajectory. Then a plan that may also cut widths of queries and
  keys, of values and of the residual stream, and, where channels of convolutions may go, one by obs. Each is repaired
  by ridge on one half of up to 384 samples and compared with the dense model on the other; it takes the plain one's
  place where it is nearer by more than one standard error, or where the plain one cannot reach the budget. A note in
  the report says what was found. Below 64 samples nothing is tried, nor beside tokens, tiles, rounds and budgets of
  time. `fxprune plan` makes the plain plan: it must mean the same where there are no data.

How elements are scored (--importance NAME, options in braces)

  trajectory   what removing an element does to the features of all later layers and to the output. Labels are not
               needed. The default with data. OPTIN's ablations are its options: {taps=none} looks at the output
               alone, {rows=768} at few rows of every map, {lambda_mode=per_unit_pow10} weighs as the reference code
               does
  fisher       second order, from gradients of masks; the cheapest of the good ones
  obs          removal one by one with the others made up for, damage measured per layer (ZipLM); allocated by a
               dynamic programme. Slow, strong on small budgets
  taylor       first order, |weight x gradient|; wants labels
  activation   how large the activations are
  l1, l2       norms of weights; no data. They rank only within a layer: shares of layers come from how flat the scores
               are
  random       the baseline
  lsp, magnitude, wanda, obert   tiles inside weights (--blocks, --sparse)

  fxprune compile model.pt --flops 0.5 --data data.npz --importance 'trajectory{mode=exact}'
  fxprune compile model.pt --flops 0.5 --data data.npz --importance fisher --rearrange 1 --recover scale

How many stay where (--search)

  two-class    exact, where heads and neurons have one cost each (plain transformers)
  dynamic      exact, for values of any form, where costs add up
  lagrangian   for every model; near the optimum, not always at it
  exhaustive   for tiny models, to check the others
  auto         the first of these that fits; what was taken is in plan.json

The width of a residual stream (--prune heads,ffn,width)

  Before scoring, a stream that is only summed and then normalised (ViT, DINOv2, GPT-2, OPT, Llama and their like) is
  turned, exactly, into the basis of what its norms see in the data, best direction first (SliceGPT, one basis for the
  whole stream). Norms, layer scales and their biases go into the layers behind; a norm that is left divides by the
  width from before, so that cutting the last directions equals masking them; in the file it is one RMS norm. The
  embeddings, the patch projection and the head become narrower too. A table that is also the head becomes two tensors,
  which the report says with what they cost (under --params and --bytes such a stream is left alone).

  It does nothing, and a note names the node or the reason, where there are no data; where the stream or its last norm
  is an output (encoders that return their tokens); post-norm streams (BERT); streams that meet anything but sums,
  scales of one branch, tables, means over tokens and norms (Swin's windows, ConvNeXt's and Mix-FFN's convolutions).
  Such widths are cut in the model's own basis, where the statistics of norms move. fxprune apply has no data, so a plan
  that cuts a turned width ("basis": "data" in plan.json) is carried out by compile with --plan and --data.

What is repaired (--recover)

  auto         none, bias, ridge and refit are tried; the one that keeps most of the dense model's answers on
               held-out samples is taken, or none. The default with data
  ridge        layers that read what was cut are solved for, in closed form
  refit        ridge, and every layer behind that reads what changed
  bias, scale  cheaper; scale is PTF's mask tuning
  tune         auto, then a bounded number of optimiser steps of distillation, without labels
  none

  A closed form takes two to three forward passes of the data in all, auto 10 to 17; below 120 samples about 22, because
  three folds are then judged, each by a fit to the others. Of so few samples auto tries refit only, at two strengths:
  over 63 plans at 32 and 64 samples what it took was 5 % farther from dense than the best candidate, 8 % when five
  candidates were judged on five folds in three times the time. Rerun: python tools/bench/few.py

Widths of queries, keys and values (--prune heads,ffn,qk,v)

  A head may turn its queries one way and its keys the other, and its values and what reads them, without changing what
  the model computes. So before anything is scored, each head is put into the basis in which its logits, and what its
  values add, lose least when the last elements go (pass align-heads). Element i then means "the i-th best direction"
  in every head of a layer, and cutting the tail is cheap: half the width of all queries and keys of all-MiniLM-L6-v2
  costs 0.4 points on STS-B with no repair, 3.7 as the model comes. The graph stays, weights are others, and the proof
  in the report says how near the outputs are. With data the basis is by the data. Without, by the weights and the norm
  before them, as if inputs were white noise, which is worth less.

  It does nothing where elements mean something by themselves: rotary positions turn queries and keys by pairs (pairs
  are then chosen as they are; values are free); a norm over them, their length, or another op stands between
  projection and product (QK norm, cosine attention); something else reads them (DeBERTa's position terms); layers
  share one weight (ALBERT); or a weight is computed anew at every call. The notes of the report name each of these
  with its reason.

  plan.json says of such a choice "basis": "data" or "weights", and applying it makes the same basis: by the same data
  the same weights. `fxprune apply` has no data: a plan by data then gets the basis by weights, with a warning. For its
  own, compile with the plan and its data.

What tokens do (--tokens): tome, prune, ppt, zero-tprune, transform, random; which does what, how many go where, and
what was measured: fxprune help tokens. Tiles of zeros inside weights: fxprune help tiles.

By hand, where the defaults are not wanted

  --members scores       which neurons stay by score alone, without OBS (of two that do the same, one can go);
                         by default channels stay by whichever of the two is nearer to dense once it is repaired
  --head-scale auto      what a head is worth against a neuron, tried on the data
  --rounds 3             score, cut a part, score again
  --importance obs       ZipLM's order and measured damage per layer, allocated by a dynamic programme
  --importance fisher --rearrange 1 --recover scale      PTF

`report.json` has each step's error before and after, the yardstick of every candidate of recovery, and why one was
rejected.

When to do what

  no data at all          --importance l2; expect to lose points below 0.75
  some unlabelled data    nothing: the defaults. 512 images or 1024 sentences are better than 128
  below 0.3 of the MACs   --recover tune, or fine-tune artifact.module afterwards: it is an ordinary module
  a vision transformer    --prune heads,ffn,tokens shares the budget with tokens

Every step is a pass with a docstring that names its paper: python -c "import fxprune.passes.transform.recover as m;
help(m)".
"""
