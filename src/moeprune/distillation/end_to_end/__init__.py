"""The whole model, by transformers' Trainer, in one process or in many that share it.

job            what a training is told
teacher        what the original has to say of a batch; `teacher_cache`, the same from disk
inner          what the student's layers put out on the way; `sizes`, by what that is measured
lora           additions instead of weights
trainer        our loss, our judging, our states; `modes`, in which mode a student learns
keeping        what lies on disk meanwhile
training       one process's share, from the job to the weights
telling        what it says of itself while it runs
processes      several processes on this machine
distilling     from checkpoint to checkpoint
"""
