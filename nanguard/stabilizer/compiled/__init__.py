"""The front end for compiled graphs: the same algebra, over the graph that dynamo captures, before autograd.

The semantics, in full:

1. Inside a block of `stabilize`, dynamo traces the mode of the block along with the user's code. That puts it on dynamo's list
   of guards, so that calls inside and outside, and blocks that keep or drop epsilons, have compiled code of their own; and it
   makes dynamo hand the graph to `Watch` before the user's backend, whichever that is. Nothing of torch is patched.
2. `Plan` walks a graph once. A value is what a node computes; values that are the very same tensor are one. What is known about
   a value holds until a node writes into memory that it, or a leaf of its term, may share.
3. A query or a quotient that an active rule matches becomes one node, which computes the term from the leaves. Derivatives are
   those of the new node, since autograd has not run yet; what nobody uses any more, nobody computes.
4. In doubt nothing is replaced: memory written into unseen, subclasses of tensors, transforms, functions of unknown effect,
   values at which derivatives are asked for, sizes about which a question cannot be answered for every call.
5. Knowledge ends at the boundaries of higher-order operations. Regions under `torch.utils.checkpoint` are graphs of their own.
6. Where a graph of a block begins and ends, knowledge crosses. What it knows about its results is told to the eager code that
   follows, together with what that depends on, as further results (`handed`). What the block knows about its inputs it takes as
   further inputs, in a graph of its own for calls in which they are known (`given`).
"""
