-- workers from 0010 go on
-- Older ones do not know how a gather is stored now, nor a step that has failed: a job that has such steps
-- would fail for good there, since its handler seems to have changed.

comment on column conductor.steps.kind is
    'what it is: step, gather, sleep, any, invoke, event, change, …; "failed …" of what raises its error in every run';
