//! Whether questions find the turns that answer them: a conversation of ours, and questions of several kinds.

use serde_json::json;

use crate::harness::{Server, on_both};

/// What was said, message and response.
const CONVERSATION: [(&str, &str); 36] = [
    ("Hey, long time no see! How have you been?", "Good, thanks! Busy with the move."),
    ("Where did you move to?", "A small flat in Porto, near the river. The rent is steep."),
    ("Nice! Did the cats survive the trip?", "Both did, though Miso hid under the seat for nine hours."),
    ("I started pottery in March, on Tuesday evenings.", "What have you made so far?"),
    ("Mostly crooked bowls. One teapot that leaks.", "Crooked bowls have character."),
    ("My sister Ines got a job at the harbour museum.", "Congratulations to her! Doing what?"),
    ("She restores old maps and ship models.", "That sounds like patient work."),
    ("By the way, my knee still hurts from the marathon.", "Did you see a doctor about it?"),
    ("Yes, Dr. Okafor said to rest it for six weeks.", "Then no running until autumn, I fear."),
    ("I might take up swimming instead.", "The pool by the park opens at seven."),
    ("What was the name of that Georgian restaurant?", "Tamada, on Elm Street. Try the cheese bread."),
    ("We should book a table for Grandma's eightieth birthday.", "When is it?"),
    ("The fourteenth of June, a Saturday.", "I will keep the day free."),
    ("She wants a small party, no speeches.", "Then we shall only sing."),
    ("I am allergic to walnuts, remember that when you bake.", "No walnuts. Almonds are fine?"),
    ("Almonds are fine.", "Good, then it is the almond cake again."),
    ("The car failed its inspection because of the brakes.", "Is the repair expensive?"),
    ("About four hundred euros, they say.", "Perhaps ask another garage."),
    ("Did you finish reading the book about octopuses?", "Last week. They taste with their arms!"),
    ("I lent it to Ravi, who teaches biology.", "He will love it."),
    ("Ravi is organising a beach cleanup in August.", "Count me in, and I can bring gloves."),
    ("How is the new boss?", "Strict but fair; she banned meetings on Fridays."),
    ("I wish ours did that.", "Send him an anonymous note."),
    ("The tomatoes on the balcony died, too much water.", "Peppers forgive more."),
    ("What are you watching these days?", "A Danish series about a bakery that hides smugglers."),
    ("Is it violent?", "Only towards pastry."),
    ("I finally got my licence to sail!", "At last! Whose boat will we take?"),
    ("My uncle's, it lies in Cascais and is called Gaivota.", "A seagull. Fitting."),
    ("The wifi at home keeps dropping in the evening.", "Move the router away from the microwave."),
    ("That worked, thank you!", "I am glad."),
    ("I want to learn Portuguese properly.", "Joana gives lessons for twelve euros an hour."),
    ("Is she patient with beginners?", "Very, she taught kindergarten for years."),
    ("I forgot to tell you: the landlord sold the house.", "Do you have to leave?"),
    ("Not before next spring.", "Then there is time to look around."),
    ("My flight to Oslo leaves on Monday at six in the morning.", "Set three alarms."),
    ("I have packed already, even the thermal socks.", "You will need them."),
];

/// A question, and the turns that answer it.
const QUESTIONS: [(&str, &[i64]); 20] = [
    ("Where does my friend live now?", &[2]),
    ("What is the cat called that hid during the trip?", &[3]),
    ("Which hobby did I begin in March?", &[4]),
    ("What have I made of clay at pottery?", &[4, 5]),
    ("What does Ines do at the museum?", &[6, 7]),
    ("What did the doctor say about my knee?", &[8, 9]),
    ("When does the swimming pool open?", &[10]),
    ("What was the Georgian restaurant called?", &[11]),
    ("When is grandma's birthday?", &[12, 13]),
    ("Which nuts am I allergic to?", &[15]),
    ("How much will repairing the brakes cost?", &[17, 18]),
    ("Who borrowed the octopus book?", &[19, 20]),
    ("When will the beach be cleaned?", &[21]),
    ("On which day are there no meetings?", &[22]),
    ("Why did the tomato plants die?", &[24]),
    ("What is the name of my uncle's boat?", &[28]),
    ("How was the wifi problem solved?", &[29]),
    ("How much do Portuguese lessons cost?", &[31]),
    ("Who sold the house?", &[33]),
    ("When does my flight leave?", &[35]),
];

on_both! {
    async fn most_questions_find_what_answers_them_among_the_first(server: Server) {
        let session = server.session(json!({})).await;
        let turns: Vec<_> = CONVERSATION.iter().map(|(m, r)| json!({"message": m, "response": r})).collect();
        server.post(&format!("/sessions/{session}/turns"), json!({"turns": turns})).await.data();
        let (mut first, mut third) = (0, 0);
        for (question, answers) in QUESTIONS {
            let hits = server.get_with("/search", "q", question).await;
            let found: Vec<i64> = hits.items().iter().map(|hit| hit["turn"].as_i64().unwrap()).collect();
            first += usize::from(found.first().is_some_and(|turn| answers.contains(turn)));
            third += usize::from(found.iter().take(3).any(|turn| answers.contains(turn)));
        }
        assert!(first >= 16 && third >= 18, "{first} first, {third} among three, of {}", QUESTIONS.len());
    }
}
