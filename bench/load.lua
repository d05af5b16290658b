-- What wrk sends, and what it tells: wrk -s bench/load.lua URL -- KIND FILE FIRST COUNT
-- The sessions that the file lists, of which COUNT from the FIRST are asked for one after the other, so that none is asked
-- for again before it has answered. A line is a session's id and, where pages in the middle are read, a cursor.

local sessions, cursors, n, kind = {}, {}, 0

local function chat(path)
    return function(id)
        local message = "What would you say about number " .. n .. " of the list?"
        return "POST", path, '{"session_id":"' .. id .. '","message":"' .. message .. '"}'
    end
end

local function get(path)
    return function(id, cursor)
        return "GET", "/api/v1" .. path:gsub("ID", id):gsub("CURSOR", cursor)
    end
end

local kinds = {
    chat = chat("/api/v1/chat"),
    stream = chat("/api/v1/chat/stream"),
    create = function() return "POST", "/api/v1/sessions", '{"user_id":"user_' .. n .. '"}' end,
    session = get("/sessions/ID"),
    page = get("/sessions/ID/turns?limit=20"),
    -- As long in a session of ten turns.
    ["first page"] = get("/sessions/ID/turns?limit=5"),
    ["last page"] = get("/sessions/ID/turns?limit=5&direction=desc"),
    ["middle page"] = get("/sessions/ID/turns?limit=5&cursor=CURSOR"),
    context = get("/sessions/ID/context?message=number+of+the+list"),
    search = get("/search?q=number+of+the+list&session_id=ID"),
    empty = function() return "GET", "/empty" end,
}

local headers = { ["Content-Type"] = "application/json" }

function init(args)
    kind = kinds[args[1]]
    local first, count, line = tonumber(args[3]), tonumber(args[4]), 0
    for text in io.lines(args[2]) do
        line = line + 1
        if line > first and line <= first + count then
            local id, cursor = text:match("^(%S+)%s*(%S*)")
            table.insert(sessions, id)
            table.insert(cursors, cursor)
        end
    end
end

function request()
    n = n + 1
    local i = n % #sessions + 1
    local method, path, body = kind(sessions[i], cursors[i])
    return wrk.format(method, path, headers, body)
end

function done(summary, latency)
    local errors = summary.errors
    io.write(string.format('{"rate": %f, "p50": %f, "p99": %f, "errors": %d}\n',
        summary.requests / summary.duration * 1e6, latency:percentile(50) / 1000, latency:percentile(99) / 1000,
        errors.status + errors.connect + errors.read + errors.write + errors.timeout))
end
