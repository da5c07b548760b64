-- What a session needs before anything else.

-- name: iso_dates
-- A database or a role may have times written otherwise, and the driver reads no other style. The
-- order of day and month in what is read stays. Poolers keep this setting with the client.
set datestyle = iso
