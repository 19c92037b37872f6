"""Graph in, graph out: capture, normalize, synthesize the inverse, partition.

The files, in the order in which a model goes through them:

* trace the model, by all of the following: `trace`
* what it takes and gives: `inputs`, `outputs`
* capture it by torch.fx: `capture`, with ops in other words, `batched`, `strided`, `packed`, and sizes
  in place of numbers, `lengths`; graphs that others captured: `ready`
* or by torch.export: `exported`, `program`, `writes`, `fixed`, `fakes`, `flexible`
* if its code asks tensors for values: `as_run`, `questions`, `following`, `guarded`, `spared`, `selected`
* normalize the graph: `normalize`, with the names of ops, `paths`, and their one spelling, `spelling`, `meanings`, `forms`, `calls`;
  with what is taken apart, `inline`, `decompose`, `parts`, and what is written into, `written`, `in_place`;
  with the samples in front: `joined`, `front`
* annotate it with what follows the input: `activity`, `entries`
* check that it computes what the model does: `checks`, `runs`, `causes`, `sizes`
* synthesize the inverse: `flow`, `region`, `copies`, `synthesize`, `inverse_op`
* split it into segments: `partition`, `plan`, by the parameters that are trained, `owned`, and what is `computed` from them
* run graphs: `interpreted`, `folded`
* small tools: `leaves`
"""

from fxinvert.passes.trace import trace

__all__ = ["trace"]
