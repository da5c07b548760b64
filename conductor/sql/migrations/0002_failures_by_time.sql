-- How many jobs failed in the last minute is asked every few seconds by who watches: failures are few.
create index history_failed on conductor.history (finished_at) where outcome = 'failed';
