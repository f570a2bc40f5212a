BEGIN TRANSACTION;
CREATE TABLE entry (key TEXT PRIMARY KEY, value TEXT NOT NULL);
INSERT INTO "entry" VALUES('key','{"verdict": true, "why": "as the rubric says"}');
COMMIT;
PRAGMA user_version = 1;
