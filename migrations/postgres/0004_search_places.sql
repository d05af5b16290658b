-- What was written last is read through by every search until it is put in its place in the index. Of 4 MB, as many as
-- there are otherwise, that took longer than the rest of the search. In kilobytes.
ALTER INDEX search_entries_terms SET (gin_pending_list_limit = 256);
